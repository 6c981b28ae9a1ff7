import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.lab.tasks.conformance import check_conformance
from tests.lab.toys import LinearRegression, NormalizedRegression, interrupt, resume, weights_after_each_step
from wnn_jax import averaging
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.reparameterized import Coefficients
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.stages import TrainCoefficients, TrainMembers, kept_checkpoints
from wnn_jax.lab.training.trainer import Trainer
from wnn_jax.late_phase import average_members, select_member


def with_checkpoints(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.sgd(learning_rate), averaging.lawa(3, 2))


TWA = Method("twa", with_checkpoints, stages=(TrainCoefficients(share=0.5, learning_rate=0.05),))


def sgd(learning_rate: float, num_steps: int, first_cycle: int, cycle: int) -> optax.GradientTransformation:
    return optax.sgd(lambda count: learning_rate * (1 + 0 * count), momentum=0.9)


LATE = Method(
    "late-phase",
    lambda learning_rate, num_steps: sgd(learning_rate, num_steps, num_steps, 1),
    stages=(TrainMembers(sgd, first=0.5, num_members=2, average_every=2),),
)


def trainer(task: Any, method: Method) -> Trainer:
    return Trainer(task, method, learning_rate=0.02, num_steps=16, evaluate_every=4)


def test_checkpoints_come_oldest_first() -> None:
    task = LinearRegression()
    fitted = Trainer(task, dataclasses.replace(TWA, stages=()), learning_rate=0.02, num_steps=11).fit(0, test=False)
    weights = weights_after_each_step(task, optax.sgd(0.02), 11)
    for kept, step in zip(kept_checkpoints(fitted.state.opt_state), (6, 8, 10), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), kept, weights[step - 1])
    with pytest.raises(UsageError, match=r"opt_state has 0 checkpoints of averaging\.lawa"):
        kept_checkpoints(optax.sgd(0.1).init(weights[0]))


def test_checkpoints_that_span_nothing_are_one_line() -> None:
    still = Trainer(LinearRegression(), TWA, learning_rate=0.0, num_steps=16, evaluate_every=4)
    with pytest.raises(
        UsageError, match=r"^learning rate 0, 'twa' cannot go on after 8 steps: checkpoints are all the same; "
    ):
        still.fit(0)


def test_coefficients_begin_at_the_average_and_get_better() -> None:
    task = LinearRegression()
    fitted = trainer(task, TWA).fit(0)
    assert [evaluation.step for evaluation in fitted.evaluations] == [4, 8, 12, 16]
    assert "TWA" not in fitted.evaluations[1].scores
    weights = weights_after_each_step(task, optax.sgd(0.02), 8)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(weights[step - 1] for step in (4, 6, 8)))
    average = Program(task, optax.sgd(0.0)).evaluate(mean, {}, "validation")["mse"]
    last = fitted.evaluations[-1].scores
    assert last["TWA"]["mse"] < average
    assert last["TWA"] == last["weights"]
    # Of a tensor each, as many as there are checkpoints.
    assert jax.tree.map(np.shape, fitted.state.params) == {"dense": {"bias": (3,), "kernel": (3,)}}


def test_coefficients_have_their_own_optimizer_rate_and_beginning() -> None:
    """With a learning rate of 0 they stay where they begin. The method's learning rate is the default."""
    task = LinearRegression()

    def sgd_on_coefficients(rate: float, num_steps: int) -> optax.GradientTransformation:
        assert num_steps == 8
        return optax.sgd(rate, momentum=0.9)

    def score(rate: float | None) -> float:
        stage = TrainCoefficients(share=0.5, learning_rate=rate, optimizer=sgd_on_coefficients, begin="last")
        fitted = trainer(task, dataclasses.replace(TWA, stages=(stage,))).fit(0, test=False)
        return fitted.evaluations[-1].scores["TWA"]["mse"]

    (*_, last) = weights_after_each_step(task, optax.sgd(0.02), 8)
    expected = Program(task, optax.sgd(0.0)).evaluate(last, {}, "validation")["mse"]
    assert score(0.0) == pytest.approx(expected, rel=1e-4)
    assert score(None) == score(0.02) < expected


def test_coefficients_are_a_task_like_any_other() -> None:
    task = LinearRegression()
    weights = weights_after_each_step(task, optax.sgd(0.02), 6)

    def make_task() -> Coefficients:
        return Coefficients(task, averaging.make_subspace(weights[1::2]), {})

    check_conformance(make_task)
    assert make_task().describe()["base"] == task.describe()


def test_coefficients_can_be_trained_on_something_else() -> None:
    stage = TrainCoefficients(share=0.5, learning_rate=0.05, task=lambda task: LinearRegression(noise=5.0))
    one, other = (
        trainer(LinearRegression(), method).fit(0) for method in (TWA, dataclasses.replace(TWA, stages=(stage,)))
    )
    assert one.evaluations[1].scores == other.evaluations[1].scores
    assert other.evaluations[2].train_loss > one.evaluations[2].train_loss + 5


def test_members_begin_alike_and_are_read_as_their_average() -> None:
    task = NormalizedRegression()
    fitted = trainer(task, LATE).fit(0)
    last = fitted.evaluations[-1]
    assert last.scores["weights"]["mse"] < fitted.evaluations[0].scores["weights"]["mse"]
    one, other = (select_member(fitted.state.params, member) for member in (0, 1))
    assert not np.array_equal(one["BatchNorm_0"]["scale"], other["BatchNorm_0"]["scale"])
    np.testing.assert_array_equal(one["Dense_0"]["kernel"], other["Dense_0"]["kernel"])
    params, stats = average_members(fitted.state.params, fitted.state.model_state["batch_stats"])
    expected = Program(task, optax.sgd(0.0)).evaluate(params, {"batch_stats": stats}, "test")
    assert fitted.test["weights"] == pytest.approx(expected)
    assert set(last.scores) == {"weights", "EMA .99", "EMA .998", "SWA"}


def test_members_take_turns() -> None:
    task = NormalizedRegression()
    early = Trainer(task, LATE, learning_rate=0.02, num_steps=2, evaluate_every=1).fit(0, test=False)
    first, second = (select_member(early.state.params, member)["BatchNorm_0"]["bias"] for member in (0, 1))
    # The stage is one step long here: the first member took it.
    assert not np.array_equal(first, second)
    plain = Trainer(task, dataclasses.replace(LATE, stages=()), learning_rate=0.02, num_steps=1).fit(0, test=False)
    np.testing.assert_array_equal(second, plain.state.params["BatchNorm_0"]["bias"])


@pytest.mark.parametrize(
    ("method", "after"),
    [pytest.param(TWA, 12, id="twa", marks=pytest.mark.slow), pytest.param(LATE, 8, id="late-phase")],
)
def test_an_interrupted_run_goes_on_bit_for_bit(method: Method, after: int, tmp_path: Path) -> None:
    run = trainer(NormalizedRegression(), method)
    interrupt(run, after, tmp_path)
    assert resume(run, tmp_path, run.fit(0)) == after + 4
