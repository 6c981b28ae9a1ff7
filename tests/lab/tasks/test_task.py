import math
from typing import Any

import pytest

from tests.lab.tasks.conformance import check_conformance
from tests.lab.toys import LinearRegression
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import Metric, check_task
from wnn_jax.lab.tasks.task import num_params


def test_a_new_kind_of_task_needs_one_call():
    check_conformance(LinearRegression, learning_rate=0.1)


def test_parameters_are_counted():
    assert num_params(LinearRegression()) == 4 * 3 + 3


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), r"LinearRegression\.metrics is empty; name at least one Metric, the target first"),
        ((Metric("a", True), Metric("a", False)), "has a name twice: a, a; give every Metric its own name"),
        ((Metric("a", "down"),), "'a' has higher_is_better='down'; say True or False"),  # pyright: ignore[reportArgumentType]
        ((Metric("a"),), "'a' has higher_is_better=None; say True or False"),
    ],
)
def test_metrics_that_cannot_be_compared_are_refused(metrics: Any, message: str):
    with pytest.raises(UsageError, match=message):
        check_task(LinearRegression(metrics=metrics))


def test_progress_has_a_direction():
    accuracy, loss = Metric("accuracy", higher_is_better=True), Metric("loss", higher_is_better=False)
    assert accuracy.is_at_least(0.9, 0.8)
    assert not accuracy.is_at_least(0.7, 0.8)
    assert loss.is_at_least(0.7, 0.8)
    assert not loss.is_at_least(0.9, 0.8)
    values = {"a": 1.0, "b": math.nan, "c": 2.0}
    assert accuracy.best(values) == "c"
    assert loss.best(values) == "a"
    for metric in (accuracy, loss):
        assert metric.is_at_least(0.8, 0.8)
        assert not metric.is_at_least(math.nan, 0.8)
