"""The table of data sets by name. They are decoded once and kept in memory."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from wnn_jax.lab.errors import UsageError, look_up
from wnn_jax.lab.tasks.data.images import (
    ImageDataset,
    half_size,
    load_cifar10,
    load_cifar100,
    load_digits,
    load_fashion_mnist,
    load_imagenet_64,
    load_mnist,
)
from wnn_jax.lab.tasks.data.prepared import is_prepared
from wnn_jax.lab.tasks.data.text import TextDataset, load_tiny_shakespeare

Dataset = ImageDataset | TextDataset
_Kind = TypeVar("_Kind", ImageDataset, TextDataset)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
      load: makes it, given the folder of prepared data sets.
      prepared: its name in TensorFlow Datasets, or `None` if it needs no download.
      builder: what its builder has to make, where TensorFlow Datasets has none.
    """

    load: Callable[[Path], Dataset]
    prepared: str | None
    builder: str | None = None


DATASETS: Mapping[str, Source] = {
    "cifar10": Source(load_cifar10, "cifar10"),
    "cifar10-16": Source(lambda data_dir: half_size(load_images("cifar10", data_dir), "cifar10-16"), "cifar10"),
    "cifar100": Source(load_cifar100, "cifar100"),
    "imagenet-64": Source(load_imagenet_64, "imagenet_resized/64x64"),
    "mnist": Source(load_mnist, "mnist"),
    "mnist-14": Source(lambda data_dir: half_size(load_images("mnist", data_dir), "mnist-14"), "mnist"),
    "fashion-mnist": Source(load_fashion_mnist, "fashion_mnist"),
    "tiny_shakespeare": Source(load_tiny_shakespeare, "tiny_shakespeare"),
    "digits": Source(lambda data_dir: load_digits(), None),
}


class MissingDatasetError(UsageError):
    """Data sets are asked for that are not in the folder of prepared ones.

    The message says how to prepare them, and what can be used instead.

    Attributes:
      prepared: their names in TensorFlow Datasets.
    """

    def __init__(self, prepared: Iterable[str], data_dir: Path, tasks: Iterable[str] = ()) -> None:
        """Makes the message.

        Args:
          prepared: the names in TensorFlow Datasets of what is missing.
          data_dir: the folder of prepared data sets.
          tasks: names of tasks that can be trained with what is there.
        """
        self.prepared = tuple(dict.fromkeys(prepared))
        self._data_dir, self._tasks = data_dir, tuple(tasks)
        builders = {source.prepared: source.builder for source in DATASETS.values() if source.builder is not None}
        downloads = [name for name in self.prepared if name not in builders]
        build = "tfds.builder(name, data_dir=folder, file_format='array_record').download_and_prepare()"
        sentences = [
            f"--data-dir {data_dir} holds no {' and no '.join(map(repr, self.prepared))} folder prepared by TensorFlow "
            "Datasets."
        ]
        if downloads:
            sentences.append(
                "To prepare what is missing (this needs TensorFlow once): "
                f'python -c "import tensorflow_datasets as tfds; folder = {str(data_dir)!r}; '
                f'[{build} for name in {downloads}]".'
            )
        sentences += [builders[name] for name in self.prepared if name in builders]
        sentences.append(f"Data sets that are there: {', '.join(available_datasets(data_dir))}.")
        if self._tasks:
            sentences.append(f"Tasks that can be trained now: {', '.join(self._tasks)}.")
        else:
            sentences.append("The family 'digits' needs no download.")
        super().__init__(" ".join(sentences))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again from its message, which is none of these arguments.
        return MissingDatasetError, (self.prepared, self._data_dir, self._tasks)


def available_datasets(data_dir: Path) -> list[str]:
    """The names of the data sets that can be loaded.

    Args:
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
    """
    return [name for name, source in DATASETS.items() if not _is_missing(source.prepared, data_dir)]


def check_datasets(names: Iterable[str], data_dir: Path) -> None:
    """Makes sure that data sets can be loaded.

    Raises:
      UsageError: if a name is not known.
      MissingDatasetError: if data sets are not there. It lists all of them.
    """
    needed = [look_up(DATASETS, name, "the data set").prepared for name in names]
    if missing := [folder for folder in needed if folder is not None and _is_missing(folder, data_dir)]:
        raise MissingDatasetError(missing, data_dir)


def _is_missing(prepared: str | None, data_dir: Path) -> bool:
    return prepared is not None and not is_prepared(prepared, data_dir)


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
    return _load(name, data_dir, ImageDataset, "does not consist of images; choose one that does, such as 'digits'")


def load_text(name: str, data_dir: Path) -> TextDataset:
    """As `load_dataset`, of text.

    Raises:
      UsageError: if the data set is another kind of data, or as `load_dataset` does.
    """
    return _load(name, data_dir, TextDataset, "is not a text; choose one that is, such as 'tiny_shakespeare'")


def _load(name: str, data_dir: Path, kind: type[_Kind], otherwise: str) -> _Kind:
    dataset = load_dataset(name, data_dir)
    if not isinstance(dataset, kind):
        raise UsageError(f"the data set {name!r} {otherwise}.")
    return dataset
