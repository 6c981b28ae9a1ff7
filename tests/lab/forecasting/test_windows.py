from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.lab.conftest import tiny_family
from wnn_jax._roles import ROLES
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories, save_trajectory
from wnn_jax.lab.forecasting.windows import CONTEXT, MIN_HORIZON, WindowSampler

LONG, SHORT = 70, 12


def coded(run: int, num_snapshots: int) -> list[Any]:
    """Weights that tell run, column and time: run * 1e6 + column * 1e3 + time."""

    def leaf(first: int, *shape: int) -> np.ndarray:
        return (run * 1e6 + 1e3 * (first + np.arange(np.prod(shape)).reshape(shape))).astype(np.float32)

    trees = {"Dense_0": {"bias": leaf(0, 3), "kernel": leaf(3, 5, 3)}, "Embed_0": {"embedding": leaf(18, 4, 2)}}
    return [{k: {n: x + time for n, x in v.items()} for k, v in trees.items()} for time in range(num_snapshots)]


def save(folder: Path, lengths: tuple[int, ...]) -> list[Trajectory]:
    for run, length in enumerate(lengths):
        save_trajectory(folder, tiny_family(), run, coded(run, length), [1.0] * length, {"loss": 1.0})
    return load_trajectories([folder])


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    return save(tmp_path_factory.mktemp("coded"), (LONG, SHORT, LONG))


def sampler(trajectories: list[Trajectory], **changes: Any) -> WindowSampler:
    settings: dict[str, Any] = {
        "trajectories": trajectories,
        "roles": ("bias", "dense", "embedding"),
        "statistics": lambda history, chosen: np.mean(history),
        "num_weights": 6,
    }
    return WindowSampler(**(settings | changes))


def decode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run, column and time."""
    whole = np.rint(values).astype(int)
    return whole // 10**6, whole // 10**3 % 10**3, whole % 10**3


def test_windows_never_cross_runs_and_go_on_evenly(trajectories: list[Trajectory]):
    draw = sampler(trajectories)
    strides = set()
    for index in range(300):
        window = draw.window(0, index)
        run, column, time = decode(window.history)
        known = int(window.is_known.sum())
        assert MIN_HORIZON <= known <= 40
        np.testing.assert_array_equal(window.is_known, np.arange(40) < known)
        future_run, future_column, future_time = decode(window.targets[:known])
        assert len({*run.flat, *future_run.flat}) == 1
        assert (column == column[0]).all()
        assert (future_column == column[0]).all()
        times = np.concatenate([time, future_time])
        assert (times == times[:, :1]).all()
        steps = np.unique(np.diff(times[:, 0]))
        assert len(steps) == 1
        strides.add(int(steps[0]))
        assert not window.targets[known:].any()
        leaf = next(x for x in trajectories[0].leaves if x.columns.start <= column[0, 0] < x.columns.stop)
        assert leaf.role == ROLES[window.role]
        # Nothing that the run has is left out.
        length = (LONG, SHORT, LONG)[run[0, 0]]
        assert known == min(40, (length - 1 - time[-1, 0]) // steps[0])
    assert strides == {1, 4, 5, 6, 7}


def test_statistics_are_told_the_whole_tensor_and_the_drawn_weights(trajectories: list[Trajectory]):
    shapes: list[tuple[int, ...]] = []

    def statistics(history: Any, chosen: np.ndarray) -> Any:
        shapes.append(history.shape)
        return history.reshape(len(history), -1)[:, chosen]

    window = sampler(trajectories, roles=("dense",), statistics=statistics).window(0, 0)
    assert set(shapes) == {(CONTEXT, 5, 3)}
    np.testing.assert_array_equal(window.statistics, window.history)


def test_the_spacing_is_within_its_bounds(trajectories: list[Trajectory], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnn_jax.lab.forecasting.windows.STRIDES", (3, 5))
    draw = sampler(trajectories[:1])
    assert {int(np.diff(decode(draw.window(0, i).history)[2][:, 0])[0]) for i in range(60)} == {3, 4, 5}


def test_a_batch_has_consecutive_windows_whose_roles_take_turns(trajectories: list[Trajectory]):
    draw = sampler(trajectories)
    batch = draw.batch(3, 2, windows_per_role=4)
    assert batch.windows.history.shape == (12, CONTEXT, 6)
    for position in range(12):
        np.testing.assert_array_equal(batch.windows.history[position], draw.window(3, 24 + position).history)
    assert [ROLES[role] for role in batch.windows.role] == ["bias", "dense", "embedding"] * 4
    for role, windows in batch.by_role().items():
        assert windows.history.shape == (4, CONTEXT, 6)
        assert {ROLES[index] for index in windows.role} == {role}
    # As on accelerators, which take several steps in one scan.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), batch, batch)
    assert (stacked.roles, stacked.windows.history.shape) == (batch.roles, (2, 12, CONTEXT, 6))


def test_what_is_missing_is_named(trajectories: list[Trajectory], tmp_path: Path):
    with pytest.raises(UsageError, match="no finished run with role 'conv'"):
        sampler(trajectories, roles=("conv",))
    with pytest.raises(UsageError, match=r"run-00000\.npz has 9 snapshots, but a window needs 10"):
        sampler(save(tmp_path, (9,)))
