"""Image classification data sets, decoded once and kept in memory as uint8."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.errors import UsageError


class Split(NamedTuple):
    """Images `[n, height, width, channels]` uint8 with labels `[n]` int32."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set whose targets are read on `validation`, a part of the original training set.

    Attributes:
      train: what is trained on.
      validation: held out of the original training set.
      test: the original test set, for one score at the end.
      num_classes: number of classes.
      max_value: the largest value that a pixel can have.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    max_value: int

    @functools.cached_property
    def mean_image(self) -> np.ndarray:
        """The per-pixel mean of the training images, `[height, width, channels]` float32 in [0, 1]."""
        return self.train.images.mean(axis=0, dtype=np.float64).astype(np.float32) / self.max_value


def load_cifar10(data_dir: Path, *, num_validation: int = 4_000) -> Dataset:
    """CIFAR-10 from a folder prepared by TensorFlow Datasets (no TensorFlow needed to read it).

    The validation images are the last `num_validation` of the training set, which is stored in shuffled order.

    Raises:
      UsageError: if there is no prepared CIFAR-10 in `data_dir`.
    """
    if not (data_dir / "cifar10").is_dir():
        raise UsageError(
            f"--data-dir {data_dir} holds no 'cifar10' folder prepared by TensorFlow Datasets. To prepare one (this "
            "needs TensorFlow once): python -c \"import tensorflow_datasets as tfds; tfds.builder('cifar10', "
            f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\". To see nowcasting at work "
            "without any download: python -m experiments.digits"
        )
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # A warning that OpenCV would be faster than Pillow.

    def decode(split: str) -> Split:
        source: Any = tfds.data_source("cifar10", split=split, data_dir=data_dir)
        examples = [(example["image"], example["label"]) for example in source]
        images, labels = zip(*examples, strict=True)
        return Split(np.stack(images), np.array(labels, np.int32))

    train = decode("train")
    return Dataset(
        train=Split(train.images[:-num_validation], train.labels[:-num_validation]),
        validation=Split(train.images[-num_validation:], train.labels[-num_validation:]),
        test=decode("test"),
        num_classes=10,
        max_value=255,
    )


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images, which come inside its wheel."""
    import sklearn.datasets

    digits: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images[order, :, :, None].astype(np.uint8)
    labels = digits.target[order].astype(np.int32)
    first, last = 897, 1397
    return Dataset(
        train=Split(images[:first], labels[:first]),
        validation=Split(images[first:last], labels[first:last]),
        test=Split(images[last:], labels[last:]),
        num_classes=10,
        max_value=16,
    )
