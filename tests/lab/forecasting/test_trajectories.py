import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.conftest import tiny_family
from wnn_jax._files import read_arrays, write_arrays
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting import trajectories as module
from wnn_jax.lab.forecasting.trajectories import (
    check_family,
    finished_runs,
    load_trajectories,
    run_file,
    save_trajectory,
)

FAMILY = tiny_family()


def snapshot(time: int) -> Any:
    return {
        "Conv_0": {
            "bias": np.arange(4, dtype=np.float32) + 100 * time,
            "kernel": np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4) + 0.1 * time,
        },
        "Dense_0": {"kernel": np.full([4, 2], -time, np.float32)},
    }


def save(folder: Path, index: int, *, loss: float = 1.0, score: float = 1.0, weight: float = 0.0) -> Path:
    snapshots = [snapshot(time) for time in range(12)]
    snapshots[-1]["Conv_0"]["bias"][2] += weight
    save_trajectory(folder, FAMILY, index, snapshots, [loss] * 12, {"loss": score})
    return run_file(folder, index)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_what_is_saved_is_read(tmp_path: Path):
    save(tmp_path, 3)
    (run,) = load_trajectories([tmp_path])
    assert (run.family, run.index, run.settings, run.split) == (FAMILY, 3, FAMILY.settings(3), FAMILY.split(3))
    assert (run.num_snapshots, run.losses, run.validation) == (12, (1.0,) * 12, {"loss": 1.0})
    assert [(leaf.name, leaf.role, leaf.shape) for leaf in run.leaves] == [
        ("Conv_0/bias", "bias", (4,)),
        ("Conv_0/kernel", "conv", (3, 3, 1, 4)),
        ("Dense_0/kernel", "dense", (4, 2)),
    ]
    for time in range(12):
        expected = snapshot(time)
        for leaf in run.leaves:
            part, name = leaf.name.split("/")
            np.testing.assert_array_equal(run.snapshots[time, leaf.columns].reshape(leaf.shape), expected[part][name])


def test_snapshots_are_mapped_into_memory_and_read_once_for_their_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 0)
    load_trajectories([tmp_path])
    monkeypatch.setattr(module, "read_arrays", pytest.fail)
    (run,) = load_trajectories([tmp_path])
    assert isinstance(run.snapshots, np.memmap)
    assert run.snapshots.shape == (12, 48)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda file: file.write_bytes(b"")])
def test_damage_is_named_with_its_remedy(tmp_path: Path, damage: Callable[[Path], None]):
    for index in range(2):
        save(tmp_path, index)
    run = load_trajectories([tmp_path])[1]
    damage(run.file)
    os.utime(run.file)
    for read in (lambda: load_trajectories([tmp_path]), lambda: run.snapshots):
        with pytest.raises(UsageError, match=r"run-00001\.npz.* Remove it and collect again: only this run") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_file_that_goes_or_changes_while_it_is_in_use_is_noticed(tmp_path: Path):
    file = save(tmp_path, 0)
    (run,) = load_trajectories([tmp_path])
    save(tmp_path, 0, weight=1.0)
    with pytest.raises(UsageError, match=r"run-00000\.npz was changed while it was in use"):
        _ = run.snapshots
    file.unlink()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"run-00000\.npz cannot be read"):
            _ = run.snapshots
        file.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings__seed": "3"}, r"Expected `int`, got `str` - at `\$\.settings\.seed`"),
        ({"settings__optimizer": "lion"}, r"Invalid enum value 'lion'"),
        ({"settings__num_steps": 7}, "its settings are not those of run 0 of its family"),
        ({"leaves": []}, "it has no tensors"),
        ({"leaves__1__1": "magic"}, "its tensor 'Conv_0/kernel' has the unknown role 'magic'"),
        ({"leaves__0__2": [0]}, r"Expected `int` >= 1"),
        ({"leaves__0__2": [5]}, r"its snapshots are float32 \(12, 48\), not float32 \(12, 49\)"),
        ({"index": 7}, "it is run 7"),
        ({"family__name": 3}, r"Expected `str`, got `int` - at `\$\.family\.name`"),
        ({"family__group_size": 0}, "is damaged: .* by zero"),
        ({"format": "wnn_jax.trajectory.5"}, "has the format 'wnn_jax.trajectory.5', but this wnn_jax reads"),
        ({"format": None}, "has the format None, but this wnn_jax reads"),
    ],
)
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    file = save(tmp_path, 0)
    header, arrays = read_arrays(file)
    for name, value in changes.items():
        *outer, last = (int(key) if key.isdigit() else key for key in name.split("__"))
        inner: Any = header
        for key in outer:
            inner = inner[key]
        inner[last] = value
    write_arrays(file, arrays, header)
    with pytest.raises(UsageError, match=message) as refused:
        load_trajectories([tmp_path])
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("shape", [(12, 48), (0, 48)])
def test_snapshots_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, int]):
    file = save(tmp_path, 0)
    header, _ = read_arrays(file)
    write_arrays(file, {"snapshots": np.zeros(shape), "losses": np.zeros(shape[0], np.float32)}, header)
    with pytest.raises(UsageError, match=rf"its snapshots are float64 \({shape[0]}, 48\), not float32"):
        load_trajectories([tmp_path])


def test_folders_without_runs_and_of_an_older_format_are_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="holds no finished runs; make some with: wnn-jax collect"):
            load_trajectories([folder])
    save(tmp_path, 0)
    (tmp_path / "manifest.json").write_text("{}")
    for read in (lambda: load_trajectories([tmp_path]), lambda: check_family(tmp_path, FAMILY)):
        with pytest.raises(UsageError, match=r"a collection of wnn_jax 0\.1 .*use the wnn_jax that wrote it"):
            read()


def test_families_do_not_mix(tmp_path: Path):
    other = dataclasses.replace(FAMILY, num_steps=50, seed=8)
    check_family(tmp_path / "missing", other)
    save(tmp_path, 0)
    check_family(tmp_path, FAMILY)
    with pytest.raises(UsageError, match="another task family, which differs in num_steps, seed"):
        check_family(tmp_path, other)
    save_trajectory(tmp_path, other, 1, [snapshot(0)], [1.0], {})
    with pytest.raises(UsageError, match=r"run-00001\.npz and .*run-00000\.npz are of two task families"):
        load_trajectories([tmp_path])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["loss", "score", "weight"])
def test_a_run_that_diverged_is_finished_but_not_used(tmp_path: Path, place: str, value: float):
    save(tmp_path, 2).rename(tmp_path / ".run-00002.npz.1.tmp")  # An unfinished run is not there.
    save(tmp_path, 0)
    save(tmp_path, 1, **{place: value})
    assert finished_runs(tmp_path) == [0, 1]
    assert [run.index for run in load_trajectories([tmp_path])] == [0]
    assert module.read_trajectory(run_file(tmp_path, 1)).diverged


def test_collections_that_share_runs_are_refused(tmp_path: Path):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        save(folder, 0)
        with pytest.raises(UsageError, match="both have run 0 of the family 'tiny'; name collections that share no"):
            load_trajectories([tmp_path, folder])
