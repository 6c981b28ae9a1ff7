import math
from typing import Any

import pytest

from tests.lab.tasks.test_new_task import LinearRegression
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import Metric, Task, check_task


def task_with(*metrics: Any) -> Task:
    task: Any = LinearRegression()
    task.metrics = metrics
    return task


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), r"LinearRegression\.metrics is empty; name at least one Metric, the target first"),
        ((Metric("a", True), Metric("a", False)), "has a name twice: a, a; give every Metric a name of its own"),
        ((Metric("a", "down"),), "'a' has higher_is_better='down'; say True or False"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_metrics_that_cannot_be_compared_are_refused(metrics: Any, message: str):
    with pytest.raises(UsageError, match=message):
        check_task(task_with(*metrics))


def test_a_direction_must_be_given():
    with pytest.raises(UsageError, match="'accuracy' has higher_is_better=None; say True or False"):
        check_task(task_with(Metric("accuracy")))


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
