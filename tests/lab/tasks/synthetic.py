"""Small data sets of the shapes of the real ones, made of random numbers, in which there is something to learn."""

from pathlib import Path

import numpy as np
import pytest

from wnn_jax.lab.tasks.data import DATASETS, ImageDataset, LabeledImages, Source, TextDataset

SIZES = {
    "cifar10": (32, 32, 3),
    "cifar10-16": (16, 16, 3),
    "cifar100": (32, 32, 3),
    "imagenet-64": (64, 64, 3),
    "mnist": (28, 28, 1),
    "mnist-14": (14, 14, 1),
    "fashion-mnist": (28, 28, 1),
}


def synthetic_images(name: str) -> ImageDataset:
    """Ten images, each of which is a class, with noise. There are more validation images than a batch has."""
    rng = np.random.default_rng(0)
    classes = rng.uniform(0, 255, [10, *SIZES[name]])

    def split(number: int) -> LabeledImages:
        labels = rng.integers(10, size=number, dtype=np.int32)
        images = 0.7 * classes[labels] + 0.3 * rng.uniform(0, 255, [number, *SIZES[name]])
        return LabeledImages(images.astype(np.uint8), labels)

    return ImageDataset(
        name=name, train=split(1_100), validation=split(503), test=split(40), num_classes=10, max_value=255
    )


def synthetic_text() -> TextDataset:
    """The same 40 of 65 characters again and again, one in five of which is replaced by any other."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(65, size=40)

    def split(number: int) -> np.ndarray:
        tokens = np.resize(pattern, number)
        replaced = rng.uniform(size=number) < 0.2
        return np.where(replaced, rng.integers(65, size=number), tokens).astype(np.uint8)

    return TextDataset(
        name="tiny_shakespeare", train=split(20_000), validation=split(7_000), test=split(700), vocab_size=65
    )


def use_synthetic_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these in the place of the data sets that need a download, whatever the folder is."""
    table = {name: Source(_loader(name), None) for name in SIZES}
    table["tiny_shakespeare"] = Source(lambda data_dir: synthetic_text(), None)
    monkeypatch.setattr("wnn_jax.lab.tasks.data.datasets.DATASETS", {**DATASETS, **table})


def _loader(name: str):
    def load(data_dir: Path) -> ImageDataset:
        return synthetic_images(name)

    return load
