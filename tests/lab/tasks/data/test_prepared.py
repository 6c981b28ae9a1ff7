"""Data of the shapes of what cannot be had here: prepared by TensorFlow Datasets, loaded and trained on."""

import dataclasses
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.lab.tasks.prepared import write_prepared
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import load_task
from wnn_jax.lab.tasks.data import load_dataset, load_images
from wnn_jax.lab.tasks.data.images import decode_images
from wnn_jax.lab.tasks.data.prepared import read_prepared
from wnn_jax.lab.training.step import init_state, make_step

IMAGES: dict[str, dict[str, Any]] = {
    "cifar100": {
        "name": "cifar100",
        "version": "3.0.2",
        "splits": {"train": 150, "test": 6},
        "sizes": [(32, 32, 3)],
        "num_classes": 100,
    },
    "fashion-mnist": {
        "name": "fashion_mnist",
        "version": "3.0.1",
        "splits": {"train": 144, "test": 6},
        "sizes": [(28, 28, 1)],
        "num_classes": 10,
    },
    "imagenet-64": {
        "name": "imagenet_resized/64x64",
        "version": "0.1.0",
        "splits": {"train": 200, "validation": 6},
        "sizes": [(64, 64, 3)],
        "num_classes": 1_000,
    },
}
POSES: dict[str, Any] = {
    "name": "coco_pose",
    "version": "1.0.0",
    "splits": {"train": 90, "validation": 6},
    "sizes": [(100, 30, 3), (40, 80, 3), (64, 48, 3)],
}


@pytest.mark.parametrize(
    ("name", "held_out", "task"),
    [
        pytest.param("cifar100", 12, "cifar100-three-conv-32", marks=pytest.mark.slow),
        ("fashion-mnist", 12, "fashion-mnist-three-conv"),
        pytest.param("imagenet-64", 2, "imagenet-64-resnet", marks=pytest.mark.slow),
    ],
)
def test_images_that_are_prepared_can_be_trained_on(name: str, held_out: int, task: str, tmp_path: Path):
    prepared = IMAGES[name]
    write_prepared(tmp_path, **prepared)
    dataset = load_images(name, tmp_path)
    train, test = prepared["splits"].values()
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [
        train - held_out,
        held_out,
        test,
    ]
    assert dataset.train.images.shape[1:] == prepared["sizes"][0]
    assert dataset.train.images.dtype == np.uint8
    assert dataset.num_classes == prepared["num_classes"]
    first = read_prepared(prepared["name"], "train", tmp_path)[0]
    np.testing.assert_array_equal(dataset.train.images[0], first["image"])
    assert dataset.train.labels[0] == first["label"]
    loaded: Any = load_task(task, tmp_path)
    params, _ = jax.eval_shape(loaded.init, jax.random.key(0))
    assert params["Dense_0"]["bias"].shape == (prepared["num_classes"],)
    if name != "cifar100":  # The network is of the kind that Fashion-MNIST has.
        train_two_steps(dataclasses.replace(loaded, model=loaded.model.copy(features=(4,)), batch_size=8))


def test_poses_that_are_prepared_can_be_trained_on(tmp_path: Path):
    write_prepared(tmp_path, **POSES)
    dataset = load_poses("coco-pose", tmp_path)
    assert [len(split.images) for split in (dataset.train, dataset.validation, dataset.test)] == [87, 3, 6]
    assert dataset.train.images.shape == (87, 64, 48, 3)
    sizes = set()
    for index, example in enumerate(read_prepared("coco_pose", "validation", tmp_path)):
        height, width, _ = example["image"].shape
        sizes.add((height, width))
        scale = [48 / width, 64 / height, 1]
        np.testing.assert_allclose(dataset.test.keypoints[index], example["keypoints"] * scale, rtol=1e-6)
        # A mean over the whole image hardly changes.
        assert abs(dataset.test.images[index].mean() - example["image"].mean()) < 4
    assert len(sizes) == 3
    loaded: Any = load_task("coco-pose-unet", tmp_path)
    assert loaded.model.num_classes == 17
    train_two_steps(dataclasses.replace(loaded, model=loaded.model.copy(features=(4,)), batch_size=8))


def train_two_steps(task: Any) -> None:
    tx = optax.adam(1e-3)
    step = jax.jit(make_step(task, tx))
    state = jax.jit(lambda key: init_state(task, tx, key))(jax.random.key(0))
    initial = state.params
    for number in range(2):
        state, loss = step(state, task.batch(0, number), jax.random.key(0))
        assert np.isfinite(loss)
    moved = jax.tree.map(lambda before, after: np.any(before != after), initial, state.params)
    assert all(jax.tree.leaves(moved))


def test_what_cannot_be_read_says_why(tmp_path: Path):
    write_prepared(tmp_path, **dict(POSES, name="fashion_mnist", version="3.0.1", splits={"train": 3}))
    with pytest.raises(UsageError, match=r"the examples of .*fashion_mnist have no 'label'; prepare it"):
        load_dataset("fashion-mnist", tmp_path)
    with pytest.raises(UsageError, match=r"fashion_mnist cannot be read \(Unknown split 'test'.*with a split 'test'"):
        read_prepared("fashion_mnist", "test", tmp_path)
    info = next(tmp_path.glob("fashion_mnist/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UsageError, match=r"TFRECORD is not supported\); prepare it .* file_format='array_record'"):
        read_prepared("fashion_mnist", "train", tmp_path)


def test_nothing_is_downloaded(tmp_path: Path):
    (tmp_path / "fashion_mnist").mkdir()
    with pytest.raises(UsageError, match="fashion_mnist cannot be read"):
        read_prepared("fashion_mnist", "train", tmp_path)
    assert not list((tmp_path / "fashion_mnist").iterdir())


class Images(Sequence[dict[str, Any]]):
    """500 images that are made when they are asked for."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError
        return {"image": np.full([64, 64, 3], index % 256, np.uint8), "label": index}


def test_there_is_never_a_second_copy_of_the_images():
    tracemalloc.start()
    images, labels = decode_images(Images())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * images.nbytes
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(500) % 256)
    np.testing.assert_array_equal(labels, np.arange(500))
