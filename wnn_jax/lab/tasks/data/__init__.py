"""Data sets by name. They are decoded once and kept in memory."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wnn_jax.lab.errors import UsageError, look_up
from wnn_jax.lab.tasks.data.datasets import ImageDataset, LabeledImages, TextDataset


class Source(NamedTuple):
    """The name of a data set in TensorFlow Datasets, or `None`, and a function that loads it from their folder."""

    prepared: str | None
    load: Callable[[str, Path], ImageDataset | TextDataset]


def read_prepared(prepared: str, split: str, data_dir: Path) -> Any:
    """Read the examples of a split that TensorFlow Datasets has prepared, without TensorFlow.

    Examples are mappings from names to arrays, decoded on access. A folder of another format or version, or without
    this split, is a `UsageError`.
    """
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # Else it warns that OpenCV is faster than Pillow.
    try:
        return tfds.data_source(prepared, split=split, data_dir=data_dir, download=False)
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise UsageError(
            f"{data_dir / prepared} cannot be read ({reason}); prepare it once more, with a split {split!r} and "
            "file_format='array_record'."
        ) from error


def decode_images(source: Sequence[Mapping[str, Any]]) -> LabeledImages:
    """Decode examples with an `image` and a `label` one by one, so memory never holds a second copy of them."""
    images = np.empty([len(source), *source[0]["image"].shape], np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(source):
        images[index], labels[index] = example["image"], example["label"]
    return LabeledImages(images, labels)


def load_digits() -> ImageDataset:
    """Load scikit-learn's handwritten digits: 1,797 real 8x8 images inside its wheel."""
    import sklearn.datasets

    digits: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order, :, :, None].astype(np.uint8), digits.target[order].astype(np.int32)
    train, validation, test = (
        LabeledImages(images[part], labels[part]) for part in (slice(897), slice(897, 1397), slice(1397, None))
    )
    return ImageDataset(name="digits", train=train, validation=validation, test=test, num_classes=10, max_value=16)


def _prepared_images(prepared: str, *, validation_share: float, test_split: str = "test") -> Source:
    """Name images from TensorFlow Datasets. The last part of their training set becomes the validation split."""

    def load(name: str, data_dir: Path) -> ImageDataset:
        source = read_prepared(prepared, "train", data_dir)
        images, labels = decode_images(source)
        start = len(source) - round(validation_share * len(source))
        return ImageDataset(
            name=name,
            train=LabeledImages(images[:start], labels[:start]),
            validation=LabeledImages(images[start:], labels[start:]),
            test=decode_images(read_prepared(prepared, test_split, data_dir)),
            num_classes=source.dataset_info.features["label"].num_classes,
            max_value=255,
        )

    return Source(prepared, load)


def _half_size(original: str, prepared: str) -> Source:
    """Name another data set of the table at half its height and width."""
    return Source(prepared, lambda name, data_dir: load_dataset(original, data_dir).half_size(name))


def _load_shakespeare(name: str, data_dir: Path) -> TextDataset:
    """Load Tiny Shakespeare, 1.1 million characters. Each character is a token."""
    texts = {
        split: np.frombuffer(read_prepared("tiny_shakespeare", split, data_dir)[0]["text"], np.uint8)
        for split in ("train", "validation", "test")
    }
    characters = np.unique(np.concatenate(list(texts.values())))
    tokens = {split: np.searchsorted(characters, text).astype(np.uint8) for split, text in texts.items()}
    return TextDataset(name=name, **tokens, vocab_size=len(characters))


DATASETS: Mapping[str, Source] = {
    "cifar10": _prepared_images("cifar10", validation_share=0.08),
    "cifar10-16": _half_size("cifar10", "cifar10"),
    "cifar100": _prepared_images("cifar100", validation_share=0.08),
    # 1.3 million images of 1,000 classes (Chrabaszcz et al., 2017), 16 GB of memory. The public validation set is the
    # test split.
    "imagenet-64": _prepared_images("imagenet_resized/64x64", validation_share=0.01, test_split="validation"),
    "mnist": _prepared_images("mnist", validation_share=1 / 12),
    "mnist-14": _half_size("mnist", "mnist"),
    "fashion-mnist": _prepared_images("fashion_mnist", validation_share=1 / 12),
    "tiny_shakespeare": Source("tiny_shakespeare", _load_shakespeare),
    "digits": Source(None, lambda name, data_dir: load_digits()),
}


def _is_there(prepared: str | None, data_dir: Path) -> bool:
    return prepared is None or any((data_dir / prepared).glob("*/dataset_info.json"))


def check_datasets(names: Iterable[str], data_dir: Path) -> None:
    """Refuse unknown names, and data sets that the folder lacks, by a `UsageError` that lists all of them."""
    prepared = dict.fromkeys(look_up(DATASETS, name, "the data set").prepared for name in names)
    missing = [name for name in prepared if not _is_there(name, data_dir)]
    if missing:
        there = [name for name, source in DATASETS.items() if _is_there(source.prepared, data_dir)]
        raise UsageError(
            f"--data-dir {data_dir} holds no {' and no '.join(map(repr, missing))} folder prepared by TensorFlow "
            "Datasets. To prepare what is missing (this needs TensorFlow once): "
            f'python -c "import tensorflow_datasets as tfds; folder = {str(data_dir)!r}; '
            "[tfds.builder(name, data_dir=folder, file_format='array_record').download_and_prepare() "
            f'for name in {missing}]". '
            f"Data sets that are there: {', '.join(there)}. The task 'digits-cnn' and the family 'digits' need no "
            "download."
        )


@functools.cache
def load_dataset(name: str, data_dir: Path) -> Any:
    """Load an `ImageDataset` or a `TextDataset` by its name, once per process. See `check_datasets` for errors."""
    check_datasets([name], data_dir)
    return DATASETS[name].load(name, data_dir)
