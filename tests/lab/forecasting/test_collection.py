import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.conftest import tiny_family
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Collection, verified_trajectories
from wnn_jax.lab.tasks.families import SplitName
from wnn_jax.lab.training.keys import run_key


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


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(path: Path, **changes: Any) -> None:
    """Changes values of a record, those named `a__b` inside of others, and its checksum with them."""
    content = json.loads(path.read_text())
    del content["checksum"]
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = content
        for key in outer:
            inner = inner[int(key) if key.isdigit() else key]
        inner[last] = value
    path.write_text(json.dumps({**content, "checksum": run_key(content)}))


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
    for time in range(12):
        expected = snapshot(time)
        for leaf in trajectory.leaves:
            module, name = leaf.name.split("/")
            np.testing.assert_array_equal(
                trajectory.snapshots[time, leaf.columns].reshape(leaf.shape), expected[module][name]
            )


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_array_is_noticed_before_it_is_used(opened: Collection, damage: Callable[[Path], None]):
    save(opened, 0)
    save(opened, 1)
    assert len(opened.trajectories()) == 2
    array = opened.folder / "run-00001.npy"
    damage(array)
    os.utime(array) if array.exists() else None
    message = r"run-00001\.npy is damaged: .* Remove its record, .*run-00001\.json, and collect again: only this run"
    for read in (opened.trajectories, lambda: verified_trajectories([opened.folder])):
        with pytest.raises(UsageError, match=message):
            read()


def test_an_array_is_read_once_for_its_checksum(opened: Collection, monkeypatch: pytest.MonkeyPatch):
    save(opened, 0)
    opened.trajectories()
    monkeypatch.setattr(hashlib, "file_digest", pytest.fail)
    (trajectory,) = Collection(opened.folder).trajectories()
    assert trajectory.snapshots.shape == (12, 48)


def test_an_array_that_is_damaged_after_it_was_opened_is_noticed(opened: Collection):
    save(opened, 0)
    (trajectory,) = opened.trajectories()
    truncate(trajectory.file)
    with pytest.raises(UsageError, match=r"run-00000\.npy is damaged: its checksum is not that of its record"):
        _ = trajectory.snapshots


def test_an_array_of_another_shape_is_refused(opened: Collection):
    save(opened, 0)
    array, record = opened.folder / "run-00000.npy", opened.folder / "run-00000.json"
    np.save(array, np.zeros([12, 48]))
    rewrite(record, sha256=hashlib.sha256(array.read_bytes()).hexdigest())
    (trajectory,) = opened.trajectories()
    with pytest.raises(UsageError, match=r"run-00000\.npy is damaged: it holds float64 \(12, 48\), not float32"):
        _ = trajectory.snapshots


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"settings": {}}', b"", b"\xff"])
def test_a_damaged_record_is_named(opened: Collection, content: bytes):
    save(opened, 0)
    (opened.folder / "run-00000.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"run-00000\.json is damaged: .* collect again: only this run is repeated"):
        opened.trajectories()


@pytest.mark.parametrize("name", ["run-00000.json", "manifest.json"])
def test_a_changed_digit_is_noticed(opened: Collection, name: str):
    save(opened, 0)
    path = opened.folder / name
    text = path.read_text()
    path.write_text(text.replace("48", "47", 1))
    assert path.read_text() != text
    with pytest.raises(UsageError, match=rf"{name} is damaged: its checksum is not that of its content\. Remove it|s"):
        Collection(opened.folder).trajectories()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("run-00000.json", {"settings__seed": "3"}, r"Expected `int`, got `str` - at `\$\.settings\.seed`"),
        ("run-00000.json", {"settings__seed": True}, r"Expected `int`, got `bool`"),
        (
            "run-00000.json",
            {"settings__optimizer": "lion"},
            r"Invalid enum value 'lion' - at `\$\.settings\.optimizer`",
        ),
        ("run-00000.json", {"settings__depth": 3}, r"unknown or missing: settings\.depth"),
        ("run-00000.json", {"mood": "good"}, "unknown or missing: mood"),
        ("run-00000.json", {"split": "held out"}, r"Invalid enum value 'held out' - at `\$\.split`"),
        ("run-00000.json", {"num_snapshots": 11}, "it has 12 losses for 11 snapshots"),
        ("run-00000.json", {"num_snapshots": 0, "losses": []}, r"Expected `int` >= 1 - at `\$\.num_snapshots`"),
        ("run-00000.json", {"losses": [None] * 12}, "not finite, but did not diverge"),
        ("run-00000.json", {"leaves": []}, "its leaves are not one behind the other"),
        ("run-00000.json", {"leaves__1__start": 5}, "its leaves are not one behind the other"),
        ("run-00000.json", {"leaves__0__start": -4}, "its leaves are not one behind the other"),
        ("run-00000.json", {"leaves__1__role": "magic"}, "the leaf 'Conv_0/kernel' has the unknown role 'magic'"),
        ("run-00000.json", {"leaves__0__shape": [0]}, r"Expected `int` >= 1 - at `\$\.leaves\[0\]\.shape"),
        ("run-00000.json", {"sha256": None}, r"Expected `str`, got `null` - at `\$\.sha256`"),
        ("run-00000.json", {"index": 7}, "is of another run"),
        ("run-00000.json", {"family": "?"}, "a run of another family"),
        ("manifest.json", {"family__name": 3}, r"Expected `str`, got `int` - at `\$\.family\.name`"),
        ("manifest.json", {"family__group_size": 0}, "the family has the group_size 0"),
        ("manifest.json", {"family__colour": "red"}, r"unknown or missing: family\.colour"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(
    opened: Collection, name: str, changes: dict[str, Any], message: str
):
    save(opened, 0)
    rewrite(opened.folder / name, **changes)
    with pytest.raises(UsageError, match=message) as refused:
        Collection(opened.folder).trajectories()
    assert str(opened.folder / name) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Remove it" in str(refused.value) or "Remove its record" in str(refused.value)


def test_a_record_under_the_name_of_another_run_is_refused(opened: Collection):
    save(opened, 0)
    for suffix in (".npy", ".json"):
        (opened.folder / f"run-00000{suffix}").rename(opened.folder / f"run-00002{suffix}")
    with pytest.raises(UsageError, match=r"run-00002\.json is of another run"):
        opened.trajectories()


@pytest.mark.parametrize("version", [1, 2, 4, None])
def test_a_manifest_of_another_version_is_refused(opened: Collection, version: int | None):
    path = opened.folder / "manifest.json"
    rewrite(path, version=version)
    content = path.read_text()
    save(opened, 0)
    message = rf"manifest\.json has version {version}, but this wnn_jax reads version 3.*was left as it is"
    with pytest.raises(UsageError, match=message):
        Collection(opened.folder)
    with pytest.raises(UsageError, match=message):
        Collection.create(opened.folder, tiny_family())
    assert path.read_text() == content


def test_a_damaged_manifest_can_be_made_anew(opened: Collection):
    save(opened, 0)
    path = opened.folder / "manifest.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="Remove it and collect again with the same family: the finished runs are"):
        Collection.create(opened.folder, tiny_family())
    path.unlink()
    assert len(Collection.create(opened.folder, tiny_family()).trajectories()) == 1


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
