"""Small random data sets with the shapes of the real ones, from which a network can learn something."""

from pathlib import Path

import numpy as np
import pytest

from wnn_jax.lab.tasks.data import DATASETS, Source
from wnn_jax.lab.tasks.data.datasets import ImageDataset, LabeledImages, TextDataset

SHAPES = {
    "cifar10": (32, 32, 3),
    "cifar10-16": (16, 16, 3),
    "cifar100": (32, 32, 3),
    "imagenet-64": (64, 64, 3),
    "mnist": (28, 28, 1),
    "mnist-14": (14, 14, 1),
    "fashion-mnist": (28, 28, 1),
}


def synthetic_images(name: str) -> ImageDataset:
    """Ten images with noise. Each image is a class. There are more validation images than a batch has."""
    rng = np.random.default_rng(0)
    classes = rng.uniform(0, 255, [10, *SHAPES[name]])

    def split(number: int) -> LabeledImages:
        labels = rng.integers(10, size=number, dtype=np.int32)
        images = 0.7 * classes[labels] + 0.3 * rng.uniform(0, 255, [number, *SHAPES[name]])
        return LabeledImages(images.astype(np.uint8), labels)

    return ImageDataset(
        name=name, train=split(1_100), validation=split(503), test=split(40), num_classes=10, max_value=255
    )


def synthetic_text() -> TextDataset:
    """The same 40 of 65 characters again and again. One in five is replaced by a random one."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(65, size=40)

    def split(number: int) -> np.ndarray:
        replaced = rng.uniform(size=number) < 0.2
        return np.where(replaced, rng.integers(65, size=number), np.resize(pattern, number)).astype(np.uint8)

    return TextDataset(
        name="tiny_shakespeare", train=split(20_000), validation=split(7_000), test=split(700), vocab_size=65
    )


def use_synthetic_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the data sets that need a download, whatever the folder is."""

    def load(name: str, data_dir: Path) -> ImageDataset | TextDataset:
        return synthetic_images(name) if name in SHAPES else synthetic_text()

    table = {name: Source(None, load) for name in (*SHAPES, "tiny_shakespeare")}
    monkeypatch.setattr("wnn_jax.lab.tasks.data.DATASETS", {**DATASETS, **table})
