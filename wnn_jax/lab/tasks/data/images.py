"""Data sets of images with labels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.tasks.data.digest import arrays_digest
from wnn_jax.lab.tasks.data.prepared import read_prepared


class LabeledImages(NamedTuple):
    """Examples.

    Attributes:
      images: `[n, height, width, channels]` uint8.
      labels: `[n]` int32, or `[n, height, width]` where pixels are labelled.
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
    return _load_prepared("cifar10", "cifar10", data_dir, validation_share=0.08)


def load_cifar100(data_dir: Path) -> ImageDataset:
    """CIFAR-100, with its 100 fine labels. The validation images are the last 4,000 of the training set."""
    return _load_prepared("cifar100", "cifar100", data_dir, validation_share=0.08)


def load_mnist(data_dir: Path) -> ImageDataset:
    """MNIST. The validation images are the last 5,000 of the training set, which is stored in shuffled order."""
    return _load_prepared("mnist", "mnist", data_dir, validation_share=1 / 12)


def load_fashion_mnist(data_dir: Path) -> ImageDataset:
    """Fashion-MNIST. The validation images are the last 5,000 of the training set."""
    return _load_prepared("fashion-mnist", "fashion_mnist", data_dir, validation_share=1 / 12)


def load_imagenet_64(data_dir: Path) -> ImageDataset:
    """ImageNet with its 1,000 classes at 64x64: 1.3 million images, which take 16 GB of memory.

    The last hundredth of the training set is for validation; the 50,000 validation images, whose labels are public, are
    the test set. At 224x224 the images would take 193 GB, which no loader here is made for.

    References:
      Chrabaszcz, Loshchilov, Hutter, `A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets
      <https://arxiv.org/abs/1707.08819>`_, 2017
    """
    return _load_prepared(
        "imagenet-64", "imagenet_resized/64x64", data_dir, validation_share=0.01, test_split="validation"
    )


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


def _load_prepared(
    name: str, prepared: str, data_dir: Path, *, validation_share: float, test_split: str = "test"
) -> ImageDataset:
    def read(split: str) -> Any:
        return read_prepared(prepared, split, data_dir, features=("image", "label"))

    source = read("train")
    train = decode_images(source)
    start = len(source) - round(validation_share * len(source))
    return ImageDataset(
        name=name,
        train=LabeledImages(train.images[:start], train.labels[:start]),
        validation=LabeledImages(train.images[start:], train.labels[start:]),
        test=decode_images(read(test_split)),
        num_classes=source.dataset_info.features["label"].num_classes,
        max_value=255,
    )


def decode_images(source: Sequence[Mapping[str, Any]]) -> LabeledImages:
    """Decodes images one after another into one array, so that there is never a second copy of them.

    Args:
      source: examples with an `image`, all of the same shape, and a `label`, such as `read_prepared` returns.
    """
    images = np.empty([len(source), *source[0]["image"].shape], np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(source):
        images[index], labels[index] = example["image"], example["label"]
    return LabeledImages(images, labels)
