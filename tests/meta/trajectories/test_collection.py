import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.meta.conftest import tiny_family
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks.families import SplitName
from wnn_jax.meta.trajectories.collection import Collection, verified_trajectories


def snapshot(time: int) -> Any:
    return {
        "Conv_0": {
            "bias": np.arange(4, dtype=np.float32) + 100 * time,
            "kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4) + 0.1 * time,
        },
        "Dense_0": {"kernel": np.full([4, 2], -time, np.float32)},
    }


def save(
    collection: Collection, index: int, *, split: SplitName = "train", loss: float = 1.0, score: float = 1.0
) -> None:
    snapshots = [snapshot(time) for time in range(12)]
    collection.save(index, tiny_family().settings(index), split, snapshots, [loss] * 12, {"loss": score})


@pytest.fixture
def opened(tmp_path: Path) -> Collection:
    return Collection.create(tmp_path / "runs", tiny_family())


def test_what_is_saved_is_read(opened: Collection):
    save(opened, 3)
    (trajectory,) = Collection(opened.folder).trajectories()
    assert (trajectory.index, trajectory.split, trajectory.num_snapshots) == (3, "train", 12)
    assert trajectory.settings == tiny_family().settings(3)
    assert (trajectory.losses, trajectory.validation) == ((1.0,) * 12, {"loss": 1.0})
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


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', ""])
def test_a_damaged_record_is_named(opened: Collection, content: str):
    save(opened, 0)
    (opened.folder / "run-00000.json").write_text(content)
    with pytest.raises(UsageError, match=r"run-00000\.json is damaged"):
        opened.trajectories()


@pytest.mark.parametrize("version", [1, 3, None])
def test_a_manifest_of_another_version_is_refused(opened: Collection, version: int | None):
    path = opened.folder / "manifest.json"
    content = json.dumps({**json.loads(path.read_text()), "version": version})
    path.write_text(content)
    save(opened, 0)
    message = rf"manifest\.json has version {version}, but this wnn_jax reads version 2.*was left as it is"
    with pytest.raises(UsageError, match=message):
        Collection(opened.folder)
    with pytest.raises(UsageError, match=message):
        Collection.create(opened.folder, tiny_family())
    assert path.read_text() == content


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"manifest\.json does not exist; make a collection with"):
        Collection(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no collection of trajectories"):
        Collection(tmp_path)


def test_families_do_not_mix(opened: Collection):
    save(opened, 0)
    assert Collection.create(opened.folder, tiny_family()).manifest == opened.manifest
    other = dataclasses.replace(tiny_family(), num_steps=50, seed=8)
    with pytest.raises(UsageError, match="another family of tasks, which differs in num_steps, seed"):
        Collection.create(opened.folder, other)


def test_a_family_without_a_finished_run_gives_way(opened: Collection):
    other = dataclasses.replace(tiny_family(), num_steps=50)
    assert Collection.create(opened.folder, other).manifest["family"]["num_steps"] == 50


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["loss", "score", "weight"])
def test_a_run_that_diverged_is_finished_but_not_used(opened: Collection, where: str, value: float):
    save(opened, 0)
    if where == "weight":
        snapshots = [snapshot(time) for time in range(12)]
        snapshots[-1]["Conv_0"]["bias"][2] = value
        opened.save(1, tiny_family().settings(1), "train", snapshots, [1.0] * 12, {"loss": 1.0})
    else:
        save(opened, 1, loss=value if where == "loss" else 1.0, score=value if where == "score" else 1.0)
    assert opened.finished() == {0, 1}
    assert [trajectory.index for trajectory in opened.trajectories()] == [0]
    json.loads((opened.folder / "run-00001.json").read_text(), parse_constant=pytest.fail)


def test_a_damaged_array_is_noticed_when_collections_are_opened(opened: Collection, tmp_path: Path):
    save(opened, 0)
    save(opened, 1)
    assert [trajectory.index for trajectory in verified_trajectories([opened.folder])] == [0, 1]
    array = opened.folder / "run-00001.npy"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(UsageError, match=r"run-00001\.npy is damaged.*Remove its record.*collect again"):
        verified_trajectories([opened.folder])


def test_collections_that_share_runs_are_refused(opened: Collection):
    save(opened, 0)
    with pytest.raises(UsageError, match="both have run 0 of the family 'tiny'; name collections that share no runs"):
        verified_trajectories([opened.folder, opened.folder])


def test_a_group_in_two_splits_is_refused(opened: Collection):
    save(opened, 0, split="train")
    save(opened, 1, split="validation")
    with pytest.raises(UsageError, match=r"run-00001\.json.*'validation'.*'train'.*must be disjoint"):
        opened.trajectories()


def test_an_unfinished_run_is_not_there(opened: Collection):
    save(opened, 0)
    (opened.folder / "run-00000.json").rename(opened.folder / ".run-00000.json.1.tmp")
    assert opened.finished() == set()
