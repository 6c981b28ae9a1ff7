import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.lab.conftest import tiny_family
from wnn_jax._roles import ROLES
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Collection, Trajectory
from wnn_jax.lab.forecasting.windows import MIN_HORIZON, OFFSETS, WindowSampler, read_window

CONTEXT = len(OFFSETS)

LONG, SHORT = 70, 12


def coded(run: int, num_snapshots: int) -> list[Any]:
    """Weights that tell run, column and time: run * 1e6 + column * 1e3 + time."""

    def leaf(first: int, *shape: int) -> np.ndarray:
        return (run * 1e6 + 1e3 * (first + np.arange(np.prod(shape)).reshape(shape))).astype(np.float32)

    trees = {"Dense_0": {"bias": leaf(0, 3), "kernel": leaf(3, 5, 3)}, "Embed_0": {"embedding": leaf(18, 4, 2)}}
    return [{k: {n: x + time for n, x in v.items()} for k, v in trees.items()} for time in range(num_snapshots)]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    collection = Collection.create(tmp_path_factory.mktemp("coded"), tiny_family())
    for run, length in enumerate((LONG, SHORT, LONG)):
        collection.save(run, tiny_family().settings(run), "train", coded(run, length), [1.0] * length, {"loss": 1.0})
    return collection.trajectories()


def sampler(trajectories: list[Trajectory], **changes: Any) -> WindowSampler:
    settings: dict[str, Any] = {
        "trajectories": trajectories,
        "roles": ("bias", "dense", "embedding"),
        "statistics": lambda history, chosen: np.mean(history),
        "num_weights": 6,
        "min_stride": 1,
        "max_stride": 16,
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
    assert len(strides) > 3


def test_snapshots_are_where_the_nowcaster_wants_them(trajectories: list[Trajectory]):
    draw = sampler([trajectories[0], trajectories[2]], offsets=(0, 4, 7, 10), min_horizon=10)
    for index in range(60):
        window = draw.window(0, index)
        start, *times = decode(window.history)[2][:, 0]
        stride = (times[-1] - start) // 10
        assert [time - start for time in times] == [4 * stride, 7 * stride, 10 * stride]
        known = int(window.is_known.sum())
        assert 10 <= known == min(40, (LONG - 1 - times[-1]) // stride)
        np.testing.assert_array_equal(
            decode(window.targets[:known])[2][:, 0], times[-1] + stride * np.arange(1, known + 1)
        )


@pytest.mark.parametrize(("stride", "start"), [(1, 2), (1, 40), (4, 2)])
def test_windows_of_running_means_are_those_that_nowcast_has(trajectories: list[Trajectory], stride: int, start: int):
    """Step by step, with the decay of a memory of one spacing; by `nowcast` itself, with steps as of the run."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=[LONG, 26]), axis=0).astype(np.float32)
    run = dataclasses.replace(trajectories[0])
    run.__dict__["snapshots"] = walk
    leaf = run.leaves[1]
    history, targets = read_window(run, leaf, start, stride, average=True)
    decay = float(np.exp(-1 / stride))
    mean, means = walk[0, leaf.columns].astype(np.float64), []
    for row in walk[:, leaf.columns]:
        mean = decay * mean + (1 - decay) * row
        means.append(mean)
    expected = means[start::stride][: CONTEXT + 40]
    np.testing.assert_allclose(np.concatenate([history, targets]), expected, rtol=1e-6, atol=1e-6)

    seen: list[np.ndarray] = []

    def look(history: Any, role: str, horizon: Any) -> Any:
        jax.debug.callback(lambda *snapshots: seen.append(np.stack(snapshots)), *history, ordered=True)
        return history[-1]

    tx = wnn_jax.nowcast(wnn_jax.leafwise(look), snapshot_every=stride, start=stride - 1, average=decay)
    params = {"kernel": jnp.asarray(walk[0, leaf.columns].reshape(leaf.shape))}
    state = tx.init(params)
    for before, after in itertools.pairwise(walk[:, leaf.columns].reshape(-1, *leaf.shape)[: 5 * stride + 1]):
        _, state = tx.update({"kernel": jnp.asarray(after - before)}, state, {"kernel": jnp.asarray(before)})
    history, _ = read_window(run, leaf, stride, stride, average=True)
    np.testing.assert_allclose(seen[0].reshape(5, -1), history, rtol=1e-5, atol=1e-5)


def test_statistics_are_of_the_whole_tensor(trajectories: list[Trajectory]):
    window = sampler(trajectories, roles=("dense",), num_weights=2).window(0, 0)
    run, _, time = (int(x.flat[0]) for x in decode(window.history))
    stride = int(decode(window.history)[2][1, 0]) - time
    expected = run * 1e6 + 1e3 * np.mean(range(3, 18)) + time + stride * (CONTEXT - 1) / 2
    assert window.statistics == pytest.approx(expected, rel=1e-6)


def test_statistics_may_be_of_the_drawn_weights(trajectories: list[Trajectory]):
    shapes: list[tuple[int, ...]] = []

    def statistics(history: Any, chosen: np.ndarray) -> Any:
        shapes.append(history.shape)
        return history.reshape(len(history), -1)[:, chosen]

    window = sampler(trajectories, roles=("dense",), statistics=statistics).window(0, 0)
    assert set(shapes) == {(CONTEXT, *leaf.shape) for leaf in trajectories[0].leaves if leaf.role == "dense"}
    np.testing.assert_array_equal(window.statistics, window.history)


def test_a_sampler_draws_running_means_from_the_same_places(trajectories: list[Trajectory]):
    settings: dict[str, Any] = {"roles": ("dense",), "num_weights": 2}
    plain, means = (sampler(trajectories, average=average, **settings).window(0, 3) for average in (False, True))
    stride = int(decode(plain.history)[2][1, 0] - decode(plain.history)[2][0, 0])
    # Of a straight line the mean is behind by its memory, less what is left of its beginning.
    behind = np.concatenate([plain.history - means.history, (plain.targets - means.targets)[plain.is_known]])
    assert (behind >= -0.2).all()
    np.testing.assert_allclose(behind[-1], 1 / np.expm1(1 / stride), atol=0.5)
    np.testing.assert_array_equal(plain.is_known, means.is_known)


def test_the_window_of_an_index_is_fixed(trajectories: list[Trajectory]):
    first, again = sampler(trajectories).window(0, 5), sampler(trajectories).window(0, 5)
    np.testing.assert_array_equal(first.history, again.history)
    draw = sampler(trajectories)
    assert any(np.any(draw.window(1, index).history != draw.window(0, index).history) for index in range(5))


def test_roles_take_turns(trajectories: list[Trajectory]):
    draw = sampler(trajectories)
    assert [ROLES[draw.window(0, index).role] for index in range(6)] == ["bias", "dense", "embedding"] * 2


def test_the_spacing_is_within_its_bounds(trajectories: list[Trajectory]):
    draw = sampler(trajectories[:1], min_stride=3, max_stride=5)
    assert {int(np.diff(decode(draw.window(0, i).history)[2][:, 0])[0]) for i in range(60)} == {3, 4, 5}


def test_a_batch_is_of_consecutive_windows(trajectories: list[Trajectory]):
    draw = sampler(trajectories)
    batch = draw.batch(3, 2, windows_per_role=4)
    assert batch.windows.history.shape == (12, CONTEXT, 6)
    for position in range(12):
        np.testing.assert_array_equal(batch.windows.history[position], draw.window(3, 24 + position).history)


def test_a_batch_knows_the_roles_of_its_windows(trajectories: list[Trajectory]):
    batch = sampler(trajectories).batch(0, 0, windows_per_role=4)
    for role, windows in batch.by_role().items():
        assert windows.history.shape == (4, CONTEXT, 6)
        assert {ROLES[index] for index in windows.role} == {role}
    doubled = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), batch)
    assert doubled.roles == batch.roles


def test_what_is_missing_is_named(trajectories: list[Trajectory], tmp_path: Path):
    with pytest.raises(UsageError, match="no finished run with role 'conv'"):
        sampler(trajectories, roles=("conv",))
    collection = Collection.create(tmp_path, tiny_family())
    collection.save(0, tiny_family().settings(0), "train", coded(0, 9), [1.0] * 9, {"loss": 1.0})
    with pytest.raises(UsageError, match="has 9 snapshots, but a window needs 10"):
        sampler(collection.trajectories())
