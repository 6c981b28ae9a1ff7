"""The table of data sets by name. They are decoded once and kept in memory."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from wnn_jax.meta.errors import UsageError, look_up
from wnn_jax.meta.tasks.data.images import ImageDataset, half_size, load_cifar10, load_digits, load_mnist
from wnn_jax.meta.tasks.data.text import TextDataset, load_tiny_shakespeare

Dataset = ImageDataset | TextDataset


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
      load: makes it, given the folder of prepared data sets.
      prepared: its name in TensorFlow Datasets, or `None` if it needs no download.
    """

    load: Callable[[Path], Dataset]
    prepared: str | None


DATASETS: Mapping[str, Source] = {
    "cifar10": Source(load_cifar10, "cifar10"),
    "cifar10-16": Source(lambda data_dir: half_size(load_images("cifar10", data_dir), "cifar10-16"), "cifar10"),
    "mnist": Source(load_mnist, "mnist"),
    "mnist-14": Source(lambda data_dir: half_size(load_images("mnist", data_dir), "mnist-14"), "mnist"),
    "tiny_shakespeare": Source(load_tiny_shakespeare, "tiny_shakespeare"),
    "digits": Source(lambda data_dir: load_digits(), None),
}


class MissingDatasetError(UsageError):
    """Data sets are asked for that are not in the folder of prepared ones.

    Attributes:
      prepared: their names in TensorFlow Datasets.
    """

    def __init__(self, prepared: Iterable[str], data_dir: Path) -> None:
        self.prepared = tuple(dict.fromkeys(prepared))
        build = "tfds.builder(name, data_dir=folder, file_format='array_record').download_and_prepare()"
        super().__init__(
            f"--data-dir {data_dir} holds no {' and no '.join(map(repr, self.prepared))} folder prepared by TensorFlow "
            "Datasets. To prepare what is missing (this needs TensorFlow once): "
            f'python -c "import tensorflow_datasets as tfds; folder = {str(data_dir)!r}; '
            f'[{build} for name in {list(self.prepared)}]". The digits need no download: data set and family '
            "'digits', task 'digits-cnn'."
        )
        self._data_dir = data_dir

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again from its message, which is none of these arguments.
        return MissingDatasetError, (self.prepared, self._data_dir)


def check_datasets(names: Iterable[str], data_dir: Path) -> None:
    """Makes sure that data sets can be loaded.

    Raises:
      UsageError: if a name is not known.
      MissingDatasetError: if data sets are not there. It lists all of them.
    """
    needed = [look_up(DATASETS, name, "the data set").prepared for name in names]
    if missing := [folder for folder in needed if folder is not None and not (data_dir / folder).is_dir()]:
        raise MissingDatasetError(missing, data_dir)


@functools.cache
def load_dataset(name: str, data_dir: Path) -> Dataset:
    """A data set of the table, loaded once per process.

    Args:
      name: a name in `DATASETS`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.

    Raises:
      UsageError: if the name is not known.
      MissingDatasetError: if the data set is not there.
    """
    check_datasets([name], data_dir)
    return DATASETS[name].load(data_dir)


def load_images(name: str, data_dir: Path) -> ImageDataset:
    """As `load_dataset`, of images.

    Raises:
      UsageError: if the data set is another kind of data, or as `load_dataset` does.
    """
    dataset = load_dataset(name, data_dir)
    if not isinstance(dataset, ImageDataset):
        raise UsageError(f"the data set {name!r} does not consist of images; choose one that does, such as 'digits'.")
    return dataset


def load_text(name: str, data_dir: Path) -> TextDataset:
    """As `load_dataset`, of text.

    Raises:
      UsageError: if the data set is another kind of data, or as `load_dataset` does.
    """
    dataset = load_dataset(name, data_dir)
    if not isinstance(dataset, TextDataset):
        raise UsageError(f"the data set {name!r} is not a text; choose one that is, such as 'tiny_shakespeare'.")
    return dataset
