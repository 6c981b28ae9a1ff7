import math

import pytest

from tests.lab.tasks.conformance import check_conformance
from tests.lab.toys import LinearRegression
from wnn_jax.lab.tasks import Metric


def test_a_new_kind_of_task_needs_one_call():
    check_conformance(LinearRegression, learning_rate=0.1)


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, "c"), (False, "a")])
def test_progress_has_a_direction(higher_is_better: bool, best: str):
    metric = Metric("metric", higher_is_better)
    assert metric.is_at_least(0.9, 0.8) == higher_is_better
    assert metric.is_at_least(0.7, 0.8) != higher_is_better
    assert metric.is_at_least(0.8, 0.8)
    assert not metric.is_at_least(math.nan, 0.8)
    assert metric.best({"a": 1.0, "b": math.nan, "c": 2.0}) == best
