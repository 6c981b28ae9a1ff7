import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from tests.lab.toys import (
    Exploding,
    LinearRegression,
    NormalizedRegression,
    interrupt,
    resume,
    weights_after_each_step,
)
from wnn_jax import averaging
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.evaluation_weights import STATISTICS_SEED, from_state
from wnn_jax.lab.training.method import Method, StageStart, check_method
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import init_state, make_step
from wnn_jax.lab.training.trainer import Evaluation, Fitted, Trainer, weights_sha256

ADAM = Method("adam", lambda learning_rate, num_steps: optax.adam(learning_rate))
NOWCAST = Method(
    "nowcast",
    lambda learning_rate, num_steps: optax.chain(
        optax.adam(learning_rate), wnn_jax.nowcast("linear", snapshot_every=2)
    ),
)


def trainer(task: Any, method: Method = NOWCAST, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"learning_rate": 0.1, "num_steps": 23, "evaluate_every": 5}
    return Trainer(task, method, **(defaults | options))


@dataclasses.dataclass(frozen=True)
class Halved:
    """A stage that goes on from half of the weights, with another optimizer."""

    def first_step(self, num_steps: int) -> int:
        return num_steps // 2

    def start(self, task: Any, state: Any, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        assert int(state.opt_state[0].count) == num_steps // 2, "the state of the method's own optimizer"
        params = jax.tree.map(lambda leaf: leaf / 2, state.params)
        return StageStart(task, optax.sgd(learning_rate), params, state.model_state)


RUNS = {
    "plain": (LinearRegression(), ADAM),
    "one stage": (LinearRegression(), NOWCAST),
    "batch statistics": (NormalizedRegression(), NOWCAST),
    "two stages": (LinearRegression(), dataclasses.replace(ADAM, stages=(Halved(),))),
}


@functools.cache
def undisturbed(name: str) -> tuple[Trainer, Fitted]:
    """A run, and how it ends."""
    run = trainer(*RUNS[name])
    return run, run.fit(0)


def test_the_step_equals_optax() -> None:
    task, tx = LinearRegression(), optax.sgd(0.1)
    state, key = init_state(task, tx, jax.random.key(0)), jax.random.key(1)
    batch = task.batch(0, 0)
    after, loss = make_step(task, tx)(state, batch, key)
    gradient, _ = jax.grad(task.loss, has_aux=True)(state.params, {}, batch, jax.random.fold_in(key, 0))
    assert after.step == 1
    assert loss == task.loss(state.params, {}, batch, jax.random.fold_in(key, 0))[0]
    assert_trees_equal(after.params, jax.tree.map(lambda param, slope: param - 0.1 * slope, state.params, gradient))


def test_a_run_learns_jumps_and_is_evaluated() -> None:
    fitted = undisturbed("one stage")[1]
    assert [evaluation.step for evaluation in fitted.evaluations] == [5, 10, 15, 20, 23]
    assert [evaluation.num_nowcasts for evaluation in fitted.evaluations] == [0, 1, 1, 2, 2]
    first, last = fitted.evaluations[0], fitted.evaluations[-1]
    assert last.train_loss < first.train_loss
    assert set(last.scores) == set(fitted.test) == {"weights", "EMA .99", "EMA .998"}
    assert last.scores["weights"]["mse"] < first.scores["weights"]["mse"]
    assert fitted.test["weights"]["mse"] != last.scores["weights"]["mse"]
    assert not fitted.diverged
    evaluation = json.loads(json.dumps(dataclasses.asdict(last)))
    assert Evaluation(**evaluation) == last


def test_scores_are_means_over_the_split() -> None:
    task = LinearRegression()
    fitted = trainer(task, ADAM, num_steps=3).fit(0)
    dense = jax.tree.map(np.asarray, fitted.state.params["dense"])
    inputs, targets = map(np.concatenate, zip(*task.evaluation_batches("test"), strict=True))
    errors = (inputs @ dense["kernel"] + dense["bias"] - targets) ** 2
    np.testing.assert_allclose(fitted.test["weights"]["mse"], errors.mean(), rtol=1e-5)
    np.testing.assert_allclose(fitted.test["weights"]["close"], (errors < 0.1).mean(), rtol=1e-5)


def test_methods_share_their_beginning_and_seeds_do_not() -> None:
    run, plain_fit = undisturbed("plain")
    fits = plain_fit, undisturbed("one stage")[1], run.fit(1)
    plain, jumping, other = (fitted.evaluations for fitted in fits)
    assert plain[0].scores["weights"] == jumping[0].scores["weights"]
    assert plain[1].scores != jumping[1].scores
    assert plain[0].train_loss != other[0].train_loss
    assert len({weights_sha256(fitted.state.params) for fitted in (*fits, run.fit(0))}) == 3


def test_one_scan_equals_a_loop_of_steps() -> None:
    ends: list[Any] = []
    for scan in (False, True):
        program = Program(LinearRegression(), NOWCAST.optimizer(0.1, 12), scan=scan)
        state, loss, _ = program.advance(program.init(0), 0, 12)
        ends.append((state, loss))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *ends)


def test_a_second_stage_begins_where_it_says() -> None:
    evaluations = undisturbed("two stages")[1].evaluations
    assert [evaluation.step for evaluation in evaluations] == [5, 10, 11, 15, 20, 23]
    assert evaluations[-1].scores != undisturbed("plain")[1].evaluations[-1].scores


@pytest.mark.slow_but(6)
@pytest.mark.parametrize(
    ("name", "after", "is_damaged", "first_step"),
    [
        *(("two stages", after, False, first) for after, first in ((5, 10), (11, 15), (15, 20))),
        *(("one stage", after, False, first) for after, first in ((15, 20), (20, 23))),
        ("one stage", 15, True, 15),
        *(("one stage", after, False, after + 5) for after in (5, 10)),
        ("batch statistics", 15, False, 20),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    name: str, after: int, is_damaged: bool, first_step: int, tmp_path: Path
) -> None:
    run, fitted = undisturbed(name)
    interrupt(run, after, tmp_path)
    if is_damaged:
        (tmp_path / "stage-0" / str(after)).write_bytes(b"damaged")
    assert resume(run, tmp_path, fitted) == first_step, "the run went on from another checkpoint"


def test_a_moving_average_is_taken_after_the_jump() -> None:
    fitted = trainer(LinearRegression(), moving_averages=(0.0,), num_steps=10).fit(0)
    last = fitted.evaluations[-1]
    assert last.num_nowcasts == 1
    assert last.scores["EMA 0"] == last.scores["weights"]


def test_a_method_has_evaluation_weights_of_its_own() -> None:
    method = Method(
        "swa",
        lambda learning_rate, num_steps: optax.chain(optax.adam(learning_rate), averaging.uniform(0, 1)),
        evaluation_weights={"SWA": from_state(averaging.uniform_eval_params)},
    )
    task = LinearRegression()
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 5, *weights_after_each_step(task, optax.adam(0.1), 5))
    scores = trainer(task, method, num_steps=5).fit(0).evaluations[-1].scores
    expected = Program(task, optax.adam(0.1)).evaluate(mean, {}, "validation")
    np.testing.assert_allclose(scores["SWA"]["mse"], expected["mse"], rtol=1e-5)


def test_averages_of_weights_have_batch_statistics_of_their_own() -> None:
    # Weights that never moved are equal to their average, and differ from it in nothing but the statistics.
    method = Method("still", lambda learning_rate, num_steps: optax.sgd(0.0))
    task = NormalizedRegression()
    fitted = trainer(task, method, num_steps=5).fit(0)
    scores = fitted.evaluations[-1].scores
    assert scores["weights"]["mse"] != scores["EMA .99"]["mse"]
    inputs = np.concatenate([task.batch(STATISTICS_SEED, step)[0] for step in range(2)])
    dense = jax.tree.map(np.asarray, fitted.state.params["Dense_0"])
    hidden = inputs @ dense["kernel"] + dense["bias"]
    program = Program(task, optax.sgd(0.0))
    statistics = {"batch_stats": {"BatchNorm_0": {"mean": hidden.mean(axis=0), "var": np.zeros(5)}}}
    # The variance is the mean of the batches' own.
    parts = hidden.reshape(2, 16, 5)
    statistics["batch_stats"]["BatchNorm_0"]["var"] = parts.var(axis=1).mean(axis=0)
    expected = program.evaluate(fitted.state.params, statistics, "validation")
    np.testing.assert_allclose(scores["EMA .99"]["mse"], expected["mse"], rtol=1e-4)


def test_a_run_that_diverges_ends_and_says_so() -> None:
    fitted = trainer(Exploding(last_step=7)).fit(0)
    assert [evaluation.step for evaluation in fitted.evaluations] == [5, 10]
    assert fitted.diverged


def test_a_run_can_be_ended() -> None:
    fitted = trainer(LinearRegression()).fit(0, stop=lambda state, evaluations: int(state.step) >= 10, test=False)
    assert [evaluation.step for evaluation in fitted.evaluations] == [5, 10]
    assert fitted.test == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), "LinearRegression.metrics is empty; name at least one"),
        ((Metric("mse", False), Metric("mse", True)), "metrics has a name twice: mse, mse"),
    ],
)
def test_metrics_that_cannot_be_compared_are_refused(metrics: tuple[Metric, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(LinearRegression(metrics=metrics))


def test_the_optimizer_of_a_method_may_read_a_file() -> None:
    method = Method("wnn", lambda rate, _: optax.chain(optax.sgd(rate), wnn_jax.nowcast("wnn", snapshot_every=2)))
    check_method(method, LinearRegression(), 0.1, 20)
