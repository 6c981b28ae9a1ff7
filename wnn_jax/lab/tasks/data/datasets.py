"""Data sets in memory: images with labels, and texts."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def arrays_digest(*arrays: np.ndarray) -> str:
    """The SHA-256 of the types, shapes and content of arrays, in this order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class LabeledImages(NamedTuple):
    """Images `[n, height, width, channels]` uint8, with labels `[n]` or, one a pixel, `[n, height, width]` int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Images with labels. The validation split is held out of the original training set.

    `num_classes` is the number of different labels, `max_value` the largest value that a pixel can have.
    """

    name: str
    train: LabeledImages
    validation: LabeledImages
    test: LabeledImages
    num_classes: int
    max_value: int

    @functools.cached_property
    def mean_image(self) -> np.ndarray:
        """The per-pixel mean of the training images, `[height, width, channels]` float32 in [0, 1]."""
        return self.train.images.mean(axis=0, dtype=np.float64).astype(np.float32) / self.max_value

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of everything in the data set but its name."""
        sizes = np.array([self.num_classes, self.max_value], np.int64)
        return arrays_digest(sizes, *self.train, *self.validation, *self.test)

    def preprocess(
        self, images: jax.Array | np.ndarray, augment: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """Turn uint8 images into the float32 inputs of a network: scale, augment, subtract the mean image.

        `augment` gets images in [0, 1].
        """
        scaled = jnp.asarray(images, jnp.float32) / self.max_value
        return (scaled if augment is None else augment(scaled)) - self.mean_image[None]

    def half_size(self, name: str) -> "ImageDataset":
        """The data set under another name, with every 2x2 pixels replaced by their mean."""

        def halve(split: LabeledImages) -> LabeledImages:
            number, height, width, channels = split.images.shape
            blocks = split.images.reshape(number, height // 2, 2, width // 2, 2, channels)
            return split._replace(images=np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8))

        splits = {split: halve(getattr(self, split)) for split in ("train", "validation", "test")}
        return dataclasses.replace(self, name=name, **splits)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset:
    """A text as tokens, in three splits of `[n]` uint8 each. `vocab_size` is the number of different tokens."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    vocab_size: int

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of everything in the data set but its name."""
        return arrays_digest(np.array([self.vocab_size], np.int64), self.train, self.validation, self.test)
