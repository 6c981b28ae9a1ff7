"""Data sets, decoded once and kept in memory."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.meta.errors import UsageError


class Split(NamedTuple):
    """Examples.

    Attributes:
      inputs: images `[n, height, width, channels]` uint8, or tokens `[n, length]` uint8.
      targets: labels `[n]` int32, or the next tokens `[n, length]` int32.
    """

    inputs: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set whose targets are read on `validation`, a part of the original training set.

    Attributes:
      train: what is trained on.
      validation: held out of the original training set.
      test: the original test set, for one score at the end.
      num_classes: number of classes, or of different tokens.
      max_value: the largest value that a pixel can have; `None` for text.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    max_value: int | None

    @functools.cached_property
    def mean_image(self) -> np.ndarray:
        """The per-pixel mean of the training images, `[height, width, channels]` float32 in [0, 1]."""
        assert self.max_value is not None
        return self.train.inputs.mean(axis=0, dtype=np.float64).astype(np.float32) / self.max_value

    def preprocess(
        self, inputs: jax.Array | np.ndarray, augment: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """What a network is given: centred images in float32, or tokens in int32.

        Args:
          inputs: as in a `Split`.
          augment: changes images, which it is given in [0, 1].
        """
        if self.max_value is None:
            return jnp.asarray(inputs, jnp.int32)
        images = jnp.asarray(inputs, jnp.float32) / self.max_value
        if augment is not None:
            images = augment(images)
        return images - self.mean_image[None]


def load_cifar10(data_dir: Path, *, num_validation: int = 4_000) -> Dataset:
    """CIFAR-10 from a folder prepared by TensorFlow Datasets (no TensorFlow needed to read it).

    The validation images are the last `num_validation` of the training set, which is stored in shuffled order.

    Raises:
      UsageError: if there is no prepared CIFAR-10 in `data_dir`.
    """
    return _load_images("cifar10", data_dir, num_validation)


def load_mnist(data_dir: Path, *, num_validation: int = 5_000) -> Dataset:
    """MNIST, as `load_cifar10` loads CIFAR-10.

    Raises:
      UsageError: if there is no prepared MNIST in `data_dir`.
    """
    return _load_images("mnist", data_dir, num_validation)


def load_tiny_shakespeare(data_dir: Path, *, length: int = 32) -> Dataset:
    """The characters of tiny Shakespeare, cut into pieces of `length`, each with the characters that follow.

    Raises:
      UsageError: if there is no prepared tiny Shakespeare in `data_dir`.
    """
    texts = {
        split: np.frombuffer(next(iter(_open("tiny_shakespeare", split, data_dir)))["text"], np.uint8)
        for split in ("train", "validation", "test")
    }
    characters = np.unique(np.concatenate(list(texts.values())))

    def cut(text: np.ndarray) -> Split:
        tokens = np.searchsorted(characters, text).astype(np.uint8)
        count = (len(tokens) - 1) // length
        inputs = tokens[: count * length].reshape(count, length)
        return Split(inputs, tokens[1 : count * length + 1].reshape(count, length).astype(np.int32))

    return Dataset(**{split: cut(text) for split, text in texts.items()}, num_classes=len(characters), max_value=None)


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


def half_size(dataset: Dataset) -> Dataset:
    """The data set with images of half the height and width: means of 2x2 pixels."""

    def halve(split: Split) -> Split:
        number, height, width, channels = split.inputs.shape
        blocks = split.inputs.reshape(number, height // 2, 2, width // 2, 2, channels)
        return split._replace(inputs=np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8))

    return dataclasses.replace(
        dataset, train=halve(dataset.train), validation=halve(dataset.validation), test=halve(dataset.test)
    )


# Every data set by name; given the folder of prepared ones.
DATASETS: Mapping[str, Callable[[Path], Dataset]] = {
    "cifar10": load_cifar10,
    "cifar10-16": lambda data_dir: half_size(load_cifar10(data_dir)),
    "mnist": load_mnist,
    "mnist-14": lambda data_dir: half_size(load_mnist(data_dir)),
    "tiny_shakespeare": load_tiny_shakespeare,
    "digits": lambda data_dir: load_digits(),
}


@functools.cache
def load_dataset(name: str, data_dir: Path) -> Dataset:
    """A data set of `DATASETS`, loaded once per process."""
    return DATASETS[name](data_dir)


def _load_images(name: str, data_dir: Path, num_validation: int) -> Dataset:
    def decode(split: str) -> Split:
        examples = [(example["image"], example["label"]) for example in _open(name, split, data_dir)]
        images, labels = zip(*examples, strict=True)
        return Split(np.stack(images), np.array(labels, np.int32))

    train = decode("train")
    return Dataset(
        train=Split(train.inputs[:-num_validation], train.targets[:-num_validation]),
        validation=Split(train.inputs[-num_validation:], train.targets[-num_validation:]),
        test=decode("test"),
        num_classes=10,
        max_value=255,
    )


def _open(name: str, split: str, data_dir: Path) -> Any:
    if not (data_dir / name).is_dir():
        raise UsageError(
            f"--data-dir {data_dir} holds no {name!r} folder prepared by TensorFlow Datasets. To prepare one (this "
            f"needs TensorFlow once): python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            f"data_dir='{data_dir}', file_format='array_record').download_and_prepare()\". To see nowcasting at work "
            "without any download: python -m experiments.digits"
        )
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # A warning that OpenCV would be faster than Pillow.
    return tfds.data_source(name, split=split, data_dir=data_dir)
