"""Data sets of images with labels."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.meta.tasks.data.digest import arrays_digest
from wnn_jax.meta.tasks.data.prepared import read_prepared


class LabeledImages(NamedTuple):
    """Examples.

    Attributes:
      images: `[n, height, width, channels]` uint8.
      labels: `[n]` int32.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Images with labels.

    Attributes:
      name: as in the table of data sets.
      train: what is trained on.
      validation: held out of the original training set; targets are read on these.
      test: the original test set, for one score at the end.
      num_classes: number of different labels.
      max_value: the largest value that a pixel can have.
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
        """Makes of images what a network is given: float32, minus the mean image.

        Args:
          images: `[n, height, width, channels]` uint8.
          augment: changes images, which it is given in [0, 1].

        Returns:
          `[n, height, width, channels]` float32.
        """
        scaled = jnp.asarray(images, jnp.float32) / self.max_value
        if augment is not None:
            scaled = augment(scaled)
        return scaled - self.mean_image[None]


def load_cifar10(data_dir: Path) -> ImageDataset:
    """CIFAR-10. The validation images are the last 4,000 of the training set, which is stored in shuffled order."""
    return _load_prepared("cifar10", data_dir, num_validation=4_000)


def load_mnist(data_dir: Path) -> ImageDataset:
    """MNIST. The validation images are the last 5,000 of the training set, which is stored in shuffled order."""
    return _load_prepared("mnist", data_dir, num_validation=5_000)


def load_digits() -> ImageDataset:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images, which come inside its wheel."""
    import sklearn.datasets

    digits: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images[order, :, :, None].astype(np.uint8)
    labels = digits.target[order].astype(np.int32)
    first, last = 897, 1397
    return ImageDataset(
        name="digits",
        train=LabeledImages(images[:first], labels[:first]),
        validation=LabeledImages(images[first:last], labels[first:last]),
        test=LabeledImages(images[last:], labels[last:]),
        num_classes=10,
        max_value=16,
    )


def half_size(dataset: ImageDataset, name: str) -> ImageDataset:
    """The data set with images of half the height and width, which are means of 2x2 pixels, under another name."""

    def halve(split: LabeledImages) -> LabeledImages:
        number, height, width, channels = split.images.shape
        blocks = split.images.reshape(number, height // 2, 2, width // 2, 2, channels)
        return split._replace(images=np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8))

    return dataclasses.replace(
        dataset,
        name=name,
        train=halve(dataset.train),
        validation=halve(dataset.validation),
        test=halve(dataset.test),
    )


def _load_prepared(name: str, data_dir: Path, *, num_validation: int) -> ImageDataset:
    def decode(split: str) -> LabeledImages:
        examples = [(example["image"], example["label"]) for example in read_prepared(name, split, data_dir)]
        images, labels = zip(*examples, strict=True)
        return LabeledImages(np.stack(images), np.array(labels, np.int32))

    train = decode("train")
    return ImageDataset(
        name=name,
        train=LabeledImages(train.images[:-num_validation], train.labels[:-num_validation]),
        validation=LabeledImages(train.images[-num_validation:], train.labels[-num_validation:]),
        test=decode("test"),
        num_classes=10,
        max_value=255,
    )
