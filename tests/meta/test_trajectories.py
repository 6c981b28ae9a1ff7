import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.meta.conftest import tiny_family
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks import SplitName
from wnn_jax.meta.trajectories import Collection


def snapshot(time: int) -> Any:
    return {
        "Conv_0": {
            "bias": np.arange(4, dtype=np.float32) + 100 * time,
            "kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4) + 0.1 * time,
        },
        "Dense_0": {"kernel": np.full([4, 2], -time, np.float32)},
    }


def save(collection: Collection, index: int, *, split: SplitName = "train", loss: float = 1.0) -> None:
    snapshots = [snapshot(time) for time in range(12)]
    collection.save(index, tiny_family().task(index), split, snapshots, [loss] * 12, loss)


@pytest.fixture
def opened(tmp_path: Path) -> Collection:
    return Collection.create(tmp_path / "runs", tiny_family())


def test_what_is_saved_is_read(opened: Collection):
    save(opened, 3)
    (trajectory,) = Collection(opened.folder).trajectories()
    assert (trajectory.index, trajectory.split, trajectory.num_snapshots) == (3, "train", 12)
    assert trajectory.task == tiny_family().task(3)
    assert [(leaf.name, leaf.role, leaf.shape) for leaf in trajectory.leaves] == [
        ("Conv_0/bias", "bias", (4,)),
        ("Conv_0/kernel", "conv", (3, 3, 1, 4)),
        ("Dense_0/kernel", "dense", (4, 2)),
    ]
    trajectory.verify()
    for time in range(12):
        expected = snapshot(time)
        for leaf in trajectory.leaves:
            module, name = leaf.name.split("/")
            np.testing.assert_array_equal(
                trajectory.snapshots[time, leaf.columns].reshape(leaf.shape), expected[module][name]
            )


def test_a_truncated_array_is_named(opened: Collection):
    save(opened, 0)
    (trajectory,) = opened.trajectories()
    trajectory.file.write_bytes(trajectory.file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"run-00000\.npy is missing or truncated.*Remove its record.*collect again"):
        _ = trajectory.snapshots
    with pytest.raises(UsageError, match=r"run-00000\.npy is damaged"):
        trajectory.verify()


def test_a_missing_array_is_named(opened: Collection):
    save(opened, 0)
    (trajectory,) = opened.trajectories()
    trajectory.file.unlink()
    with pytest.raises(UsageError, match=r"run-00000\.npy is missing"):
        _ = trajectory.snapshots


@pytest.mark.parametrize("content", ["{", "[]", '{"task": {}}', ""])
def test_a_damaged_record_is_named(opened: Collection, content: str):
    save(opened, 0)
    (opened.folder / "run-00000.json").write_text(content)
    with pytest.raises(UsageError, match=r"run-00000\.json is damaged"):
        opened.trajectories()


def test_a_manifest_of_another_version_is_refused(opened: Collection):
    path = opened.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(UsageError, match=r"manifest\.json has version 2, but this wnn_jax reads version 1"):
        Collection(opened.folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"manifest\.json does not exist; make a collection with"):
        Collection(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no collection of trajectories"):
        Collection(tmp_path)


def test_families_do_not_mix(opened: Collection):
    assert Collection.create(opened.folder, tiny_family()).manifest == opened.manifest
    other = dataclasses.replace(tiny_family(), num_steps=50, seed=8)
    with pytest.raises(UsageError, match="another family of tasks, which differs in num_steps, seed"):
        Collection.create(opened.folder, other)


def test_a_run_that_diverged_is_finished_but_not_used(opened: Collection):
    save(opened, 0)
    save(opened, 1, loss=float("nan"))
    assert opened.finished() == {0, 1}
    assert [trajectory.index for trajectory in opened.trajectories()] == [0]


def test_a_group_in_two_splits_is_refused(opened: Collection):
    save(opened, 0, split="train")
    save(opened, 1, split="validation")
    with pytest.raises(UsageError, match=r"run-00001\.json.*'validation'.*'train'.*must be disjoint"):
        opened.trajectories()


def test_an_unfinished_run_is_not_there(opened: Collection):
    save(opened, 0)
    (opened.folder / "run-00000.json").rename(opened.folder / ".run-00000.json.1.tmp")
    assert opened.finished() == set()
