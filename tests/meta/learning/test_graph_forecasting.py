"""The task of forecasting whole models: its errors are those of the nowcaster, whatever fills up a batch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import random_leaves
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.learning import graph_forecasting
from wnn_jax.meta.learning.forecasting import by_split
from wnn_jax.meta.learning.graph_forecasting import GraphForecasting, NiNoObjective
from wnn_jax.meta.learning.train import Train, train
from wnn_jax.meta.tasks.families import SPLITS
from wnn_jax.meta.training.program import Program
from wnn_jax.meta.trajectories.collection import Leaf, Trajectory, verified_trajectories
from wnn_jax.meta.trajectories.windows import read_window
from wnn_jax.nowcasters import NiNo
from wnn_jax.nowcasters._neural_graph.graph import KINDS

# Room for one run of the largest network at least.
SIZES = {"num_edges": 20_000, "num_nodes": 512, "num_tensors": 16}


@pytest.fixture(autouse=True)
def _few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_forecasting, "_EVALUATION_BATCHES", 1)


@pytest.fixture(scope="module")
def make_task(collection: Path) -> Callable[..., GraphForecasting]:
    splits = by_split(verified_trajectories([collection]))

    def make(**changes: Any) -> GraphForecasting:
        settings: dict[str, Any] = {"num_weights": 16, "min_stride": 1, "max_stride": 2}
        merged: Any = {"objective": NiNoObjective(8), "trajectories": splits} | settings | SIZES | changes
        return GraphForecasting(**merged)

    return make


@pytest.fixture(scope="module")
def params() -> Any:
    return random_leaves(jax.eval_shape(lambda key: NiNo.init(key, width=8).params, jax.random.key(0)), seed=0)


def snapshot(trajectory: Trajectory, time: int) -> Any:
    row = trajectory.snapshots[time]
    leaves = {leaf.name: jnp.asarray(row[leaf.columns].reshape(leaf.shape)) for leaf in trajectory.leaves}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


MODELS = {
    # A transformer that has queries, keys and values in one leaf.
    "joined attention": {
        "Dense_0/kernel": (4, 8),
        "Dense_1/kernel": (8, 4),
        "Dense_2/kernel": (4, 11),
        "attention/out/kernel": (4, 4),
        "attention/qkv/bias": (3, 2, 2),
        "attention/qkv/kernel": (4, 3, 2, 2),
        "wte/embedding": (11, 4),
    },
    # Of 16 and of 25 elements, cut into 2 and into 3 edges.
    "large windows": {
        "Conv_0/bias": (3,),
        "Conv_0/kernel": (4, 4, 2, 3),
        "Conv_1/kernel": (5, 5, 3, 4),
    },
}


def of_model(run: Trajectory, shapes: dict[str, tuple[int, ...]]) -> Trajectory:
    """A run of as many snapshots of another model."""
    roles = {"bias": "bias", "embedding": "embedding", "kernel": "dense"}
    leaves, start = list[Leaf](), 0
    for name, shape in shapes.items():
        role = "conv" if name.startswith("Conv") and len(shape) == 4 else roles[name.rpartition("/")[2]]
        leaves.append(Leaf(name, role, shape, start))
        start = leaves[-1].columns.stop
    made = dataclasses.replace(run, leaves=tuple(leaves))
    steps = np.random.default_rng(0).normal(size=(run.num_snapshots, start))
    made.__dict__["snapshots"] = np.cumsum(steps, axis=0, dtype=np.float32)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("model", ["a chain", *MODELS])
def test_errors_are_those_of_the_nowcaster(make_task: Any, params: Any, monkeypatch: pytest.MonkeyPatch, model: str):
    """Of all weights of a model, in a window that is found again by its first snapshot."""
    start, stride = 3, 2
    monkeypatch.setattr(graph_forecasting, "draw_place", lambda *_: (start, stride))
    trajectory = make_task().trajectories["train"][0]
    if model in MODELS:
        trajectory = of_model(trajectory, MODELS[model])
    largest = max(int(np.prod(leaf.shape)) for leaf in trajectory.leaves)
    only = {split: [trajectory] for split in SPLITS}
    # As many edges as one model has, so that there is one in the batch.
    num_edges = make_task(trajectories=only)._models["train"][0].num_edges
    task = make_task(trajectories=only, num_weights=4 * largest, num_edges=num_edges, num_tensors=12)
    # Drawn with replacement, nearly all of them; drawn so that all of them count alike, here.
    monkeypatch.setattr(
        graph_forecasting._Filling, "_draw_edges", lambda self, number, rng: np.arange(4 * largest) % number
    )
    batch = next(task.evaluation_batches("test"))
    errors, is_known = task._errors(params, batch)
    horizon = 5
    history = [snapshot(trajectory, start + stride * time) for time in range(5)]
    forecast = NiNo(params)(history, wnn_jax.default_roles(history[0]), horizon)
    forecast = flax.traverse_util.flatten_dict(forecast, sep="/")
    num_known = 0
    pieces, tensors = task._models["train"][0].graph.pieces, task._models["train"][0].tensors
    assert len(pieces) == len(trajectory.leaves) + 4 * (model == "joined attention")
    for number, (piece, edges) in enumerate(zip(pieces, tensors, strict=True)):
        leaf = trajectory.leaves[piece.leaf]
        past, future = read_window(trajectory, leaf, start, stride)
        num_known = len(future)
        new = np.asarray(forecast[leaf.name]).reshape(-1)
        # How often each weight was drawn; those of other tensors in the leaf never.
        drawn = edges.places[np.arange(4 * largest) % len(edges.places)]
        weight = np.bincount(drawn[drawn >= 0], minlength=new.size)
        assert (weight > 0).sum() == piece.of(np.zeros(leaf.shape)).size
        error = (weight * np.abs(new - future[horizon - 1])).sum()
        no_change = (weight * np.abs(past[-1] - future[horizon - 1])).sum()
        assert bool(is_known[number, horizon - 1])
        np.testing.assert_allclose(errors[number, horizon - 1], error / no_change, rtol=2e-3)
    assert not np.any(is_known[len(pieces) :])
    assert 5 <= num_known < 40
    assert not np.any(is_known[:, num_known:])


def test_running_means_are_forecast_where_wanted(make_task: Any, monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []

    def read(*args: Any, average: bool) -> Any:
        asked.append(average)
        return read_window(*args, average=average)

    monkeypatch.setattr(graph_forecasting, "read_window", read)
    plain, means = (make_task(average=average).batch(0, 0) for average in (False, True))
    assert set(asked) == {False, True}
    assert np.any(plain.changes != means.changes)
    np.testing.assert_array_equal(plain.chosen, means.chosen)


def test_what_fills_up_changes_nothing(make_task: Any, params: Any):
    """A batch of one model, in little room and in much."""
    number = make_task()._models["train"][0].num_edges
    one = dict.fromkeys(SPLITS, make_task().trajectories["train"][:1])
    tight, wide = (
        make_task(trajectories=one, num_edges=size, num_nodes=nodes, num_tensors=tensors)
        for size, nodes, tensors in ((number, 256, 8), (2 * number - 1, 512, 8))
    )
    losses = [task.loss(params, {}, task.batch(1, 2), None)[0] for task in (tight, wide)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert np.isfinite(losses).all()


def test_the_batch_of_a_step_is_fixed(make_task: Any):
    task, again = make_task(), make_task()
    jax.tree.map(np.testing.assert_array_equal, task.batch(3, 5), again.batch(3, 5))
    assert np.any(task.batch(3, 5).changes != task.batch(4, 5).changes)
    assert np.any(task.batch(3, 5).changes != task.batch(3, 6).changes)
    assert jax.tree.map(np.shape, task.batch(3, 5)) == jax.tree.map(np.shape, task.batch(4, 6))


def test_signs_are_drawn_in_training(make_task: Any, monkeypatch: pytest.MonkeyPatch):
    """One for all weights of a model, and one for each of its eigenvectors."""
    monkeypatch.setattr(graph_forecasting, "draw_place", lambda *_: (3, 2))
    monkeypatch.setattr(graph_forecasting._Filling, "_draw_edges", lambda self, number, rng: np.arange(16) % number)
    one = dict.fromkeys(SPLITS, make_task().trajectories["train"][:1])
    task = make_task(trajectories=one, num_edges=make_task()._models["train"][0].num_edges)
    expected = next(task.evaluation_batches("test"))
    kinds, drawn = expected.edges.kinds, set[tuple[float, ...]]()
    is_weight = (kinds != KINDS["self"]) & (kinds != 0)
    for step in range(8):
        batch = task.batch(0, step)
        sign = np.sign(batch.changes.ravel() @ expected.changes.ravel())
        signs = np.sign((batch.positions * expected.positions).sum(axis=0))
        np.testing.assert_allclose(batch.changes, sign * expected.changes, rtol=1e-4, atol=1e-4)
        features, before = batch.edges.features, expected.edges.features
        np.testing.assert_allclose(features[is_weight], sign * before[is_weight], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(features[~is_weight], before[~is_weight])
        np.testing.assert_allclose(batch.positions, signs * expected.positions)
        drawn.add((sign, *signs))
    assert {1, -1} == {sign for sign, *_ in drawn}
    assert len(drawn) == 8


@pytest.mark.slow
def test_it_learns(make_task: Any):
    task = make_task()
    batch, params, tx = task.batch(0, 0), task.init(jax.random.key(0))[0], optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda params: task.loss(params, {}, batch, None)[0])(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    # It begins with forecasts of no change.
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.97


def test_its_scores_are_those_of_its_metrics(make_task: Any, params: Any):
    task = make_task()
    scores = Program(task, optax.identity).evaluate(params, {}, "validation")
    assert scores.keys() == {metric.name for metric in task.metrics}
    assert np.isfinite(list(scores.values())).all()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    assert np.isnan(list(Program(task, optax.identity).evaluate(broken, {}, "validation").values())).all()


def test_its_description_is_of_the_content_of_all_runs(make_task: Any):
    task = make_task()
    description = task.describe()
    assert description == make_task().describe()
    for split, runs in task.trajectories.items():
        fewer = make_task(trajectories={**task.trajectories, split: runs[:1]}).describe()
        assert [name for name in SPLITS if fewer["runs"][name] != description["runs"][name]] == [split]


def test_runs_that_cannot_be_read_or_do_not_fit_are_left_out(make_task: Any):
    trajectories = dict(make_task().trajectories)
    first, *others = trajectories["train"]
    unreadable = dataclasses.replace(
        first, leaves=tuple(dataclasses.replace(leaf, name=f"leaf{i}") for i, leaf in enumerate(first.leaves))
    )
    task = make_task(trajectories={**trajectories, "train": [unreadable, *others]})
    assert task.used == {**trajectories, "train": others}
    with pytest.raises(UsageError, match="no finished run for 'train' whose neural graph can be read"):
        make_task(trajectories={**trajectories, "train": [unreadable]})
    with pytest.raises(UsageError, match="no finished run for 'train' whose neural graph can be read"):
        make_task(num_nodes=10)


@pytest.mark.slow
def test_it_is_trained_by_the_command(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And says which runs it left out, here all but the first of each split."""
    monkeypatch.setattr("wnn_jax.meta.learning.train.KINDS", {"nino": NiNoObjective(8)})
    first = {split: runs[0] for split, runs in by_split(verified_trajectories([collection])).items()}
    only = {(run.family, run.index) for run in first.values()}
    read = GraphForecasting._model
    monkeypatch.setattr(
        GraphForecasting,
        "_model",
        lambda self, run: read(self, run) if (run.family, run.index) in only else None,
    )
    options = Train(
        collection=(collection,),
        output=tmp_path,
        kind="nino",
        num_steps=4,
        validate_every=2,
        num_weights=8,
        max_stride=4,
    )
    nowcaster: Any = train(options)
    assert isinstance(nowcaster, NiNo)
    assert nowcaster.record["kind"] == "nino"
    assert {nowcaster.record["data"][split]["runs"] for split in SPLITS} == {1}
    assert "left out, because their graph cannot be read or is too large, in 'train': " in capsys.readouterr().out
    assert np.isfinite(nowcaster.record["test"]["forecast error"])
    assert isinstance(wnn_jax.load(tmp_path / "nowcaster.npz"), NiNo)
