"""Data sets in memory: images with labels, and texts. Their batches, and random changes of images."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from wnn_jax.lab.errors import UsageError

# From a `jax.random` key and images `[n, height, width, channels]` in [0, 1] to images of the same shape.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def arrays_digest(*arrays: np.ndarray) -> str:
    """Return the SHA-256 of the types, shapes and content of arrays, in this order."""
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
        """Make inputs of a network: scale uint8 images to [0, 1], augment, subtract the mean image."""
        scaled = jnp.asarray(images, jnp.float32) / self.max_value
        return (scaled if augment is None else augment(scaled)) - self.mean_image[None]

    def half_size(self, name: str) -> "ImageDataset":
        """Return the data set under another name, with every 2x2 pixels replaced by their mean."""

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


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """Return the indices of the examples in the training batch of a step, `[batch_size]` int32.

    Every epoch has its own random order, which the seed decides. Its incomplete last batch is left out.
    """
    epoch, position = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)
    order.setflags(write=False)
    return order


def consecutive_batches(examples: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield all examples in their order, `batch_size` at a time. The last batch may be smaller."""
    for start in range(0, len(next(iter(examples.values()))), batch_size):
        yield {name: array[start : start + batch_size] for name, array in examples.items()}


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Refuse a batch size that is not positive or exceeds the training set, by a `UsageError`."""
    if not 1 <= batch_size <= num_examples:
        raise UsageError(f"batch_size={batch_size} must be positive and at most {num_examples}, the training examples.")


def random_mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Swap left and right of each image with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=[images.shape[0], 1, 1, 1])
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_affine(key: jax.Array, images: jax.Array) -> jax.Array:
    """Rotate, shift and zoom each image on its own, with bilinear interpolation and repeated edge pixels.

    This is the augmentation of Jang et al., ICML 2023: uniform rotations up to 10 degrees, shifts up to 15 % of the
    size, and zooms of each axis up to 30 %.
    """
    number, height, width, _ = images.shape
    keys = jax.random.split(key, 3)
    angle = jnp.deg2rad(jax.random.uniform(keys[0], [number], minval=-10.0, maxval=10.0))
    shift = jax.random.uniform(keys[1], [number, 2], minval=-0.15, maxval=0.15)
    zoom = jax.random.uniform(keys[2], [number, 2], minval=0.7, maxval=1.3)
    return jax.vmap(_affine)(images, angle, shift * jnp.array([[height, width]]), zoom)


def _affine(image: jax.Array, angle: jax.Array, shift: jax.Array, zoom: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - center_y, jnp.arange(width) - center_x, indexing="ij")
    y, x = y * zoom[0], x * zoom[1]
    source_y = jnp.cos(angle) * y - jnp.sin(angle) * x + shift[0] + center_y
    source_x = jnp.sin(angle) * y + jnp.cos(angle) * x + shift[1] + center_x
    sample = functools.partial(map_coordinates, coordinates=[source_y, source_x], order=1, mode="nearest")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
