import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.conftest import tiny_family
from wnn_jax._files import read_arrays, write_arrays
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.trajectories import (
    check_family,
    finished_runs,
    load_trajectories,
    read_trajectory,
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


def test_what_is_saved_is_read(tmp_path: Path):
    save(tmp_path, 3)
    (run,) = load_trajectories([tmp_path])
    assert (run.family, run.index, run.settings, run.split) == (FAMILY, 3, FAMILY.settings(3), FAMILY.split(3))
    assert (len(run.snapshots), run.losses, run.validation) == (12, (1.0,) * 12, {"loss": 1.0})
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


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.write_bytes(b"")])
def test_damage_is_named_with_its_remedy(tmp_path: Path, damage: Callable[[Path], None]):
    damage(save(tmp_path, 1))
    with pytest.raises(UsageError, match=r"run-00001\.npz.* Remove it and collect again: only this run") as refused:
        load_trajectories([tmp_path])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Else a nowcaster might be trained on a run that is held out.
        ({"index": 7}, "is not the run 7 of the family 'tiny' that it says it is. Remove it and collect again"),
        ({"settings": {}}, "is not the run 0 of the family 'tiny' that it says it is"),
        ({"format": "wnn_jax.trajectory.5"}, "has the format 'wnn_jax.trajectory.5', but this wnn_jax reads"),
    ],
)
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    file = save(tmp_path, 0)
    header, arrays = read_arrays(file)
    write_arrays(file, arrays, header | changes)
    with pytest.raises(UsageError, match=message) as refused:
        load_trajectories([tmp_path])
    assert str(file) in str(refused.value)


def test_folders_without_runs_are_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="holds no finished runs; make some with: wnn-jax collect"):
            load_trajectories([folder])


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
    assert read_trajectory(run_file(tmp_path, 1)).diverged


def test_collections_that_share_runs_are_refused(tmp_path: Path):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        save(folder, 0)
        with pytest.raises(UsageError, match="both have run 0 of the family 'tiny'; name collections that share no"):
            load_trajectories([tmp_path, folder])
