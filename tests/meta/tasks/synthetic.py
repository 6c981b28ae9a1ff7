"""Small data sets of the shapes of the real ones, made of random numbers, in which there is something to learn."""

from pathlib import Path

import numpy as np
import pytest

from wnn_jax.meta.tasks.data import DATASETS, ImageDataset, LabeledImages, PoseDataset, Poses, Source, TextDataset

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


def synthetic_poses() -> PoseDataset:
    """Spots in the dark, each of which is a keypoint, of a color and within a part of the image of its own."""
    rng = np.random.default_rng(0)
    colors, middles = rng.integers(64, 256, size=[17, 3]), rng.integers([10, 10], [39, 55], size=[17, 2])

    def split(number: int) -> Poses:
        images = rng.integers(32, size=[number, 64, 48, 3], dtype=np.uint8)
        places = middles + rng.integers(-4, 5, size=[number, 17, 2])
        is_labelled = rng.uniform(size=[number, 17, 1]) < 0.8
        for image, person in zip(images, places, strict=True):
            for (x, y), color in zip(person, colors, strict=True):
                image[y - 1 : y + 2, x - 1 : x + 2] = color
        return Poses(images, np.concatenate([places + 0.5, is_labelled], axis=-1).astype(np.float32))

    return PoseDataset(name="coco-pose", train=split(100), validation=split(53), test=split(40))


def use_synthetic_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these in the place of the data sets that need a download, whatever the folder is."""
    table = {name: Source(_loader(name), None) for name in SIZES}
    table["coco-pose"] = Source(lambda data_dir: synthetic_poses(), None)
    table["tiny_shakespeare"] = Source(lambda data_dir: synthetic_text(), None)
    monkeypatch.setattr("wnn_jax.meta.tasks.data.datasets.DATASETS", {**DATASETS, **table})


def _loader(name: str):
    def load(data_dir: Path) -> ImageDataset:
        return synthetic_images(name)

    return load
