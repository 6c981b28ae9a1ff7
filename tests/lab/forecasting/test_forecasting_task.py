from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.lab.forecasting.conftest import NUM_EVALUATION_WINDOWS
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.families import SPLITS
from wnn_jax.lab.forecasting.forecasting_task import EVALUATED_SPLITS, ForecastingTask
from wnn_jax.lab.forecasting.kinds import KINDS
from wnn_jax.lab.forecasting.trajectories import load_trajectories
from wnn_jax.lab.training.program import Program


@pytest.fixture(scope="module")
def make_task(collection: Path) -> Any:
    runs = load_trajectories([collection])

    def make(kind: str = "wnn-plus", trajectories: Any = runs, **changes: int) -> ForecastingTask:
        settings = {"windows_per_role": 3, "num_weights": 8}
        return ForecastingTask(KINDS[kind], trajectories, **(settings | changes))

    return make


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("kind", ["wnn-plus", "wnn", "pooled-linear"])
def test_the_forecast_error_is_a_mean_over_windows_horizons_and_parts(make_task: Any, kind: str):
    task = make_task(kind)
    params, model_state = task.init(jax.random.key(0))
    for split in ("validation", "test"):
        scores = Program(task, optax.identity()).evaluate(params, model_state, split)
        means, at_five = [], []
        for batch, _ in task.evaluation_batches(split):
            errors = np.asarray(task.kind.errors(params, batch))
            assert len(errors) == NUM_EVALUATION_WINDOWS * len(batch.roles)
            by_horizon = np.nanmean(errors[:, np.isfinite(errors).any(axis=0)], axis=0)
            means.append(by_horizon.mean())
            at_five.append(np.nanmean(errors[:, 4]))
        assert scores["forecast error"] == pytest.approx(np.mean(means), rel=1e-5)
        assert [scores["runs"], scores["architectures"]] == pytest.approx(means, rel=1e-5)
        assert scores["5 ahead"] == pytest.approx(np.mean(at_five), rel=1e-5)


def test_a_network_that_diverged_has_no_finite_error(make_task: Any):
    task = make_task()
    params, model_state = task.init(jax.random.key(0))
    diverged = jax.tree.map(lambda leaf: leaf * np.nan, params)
    assert np.isnan(list(Program(task, optax.identity()).evaluate(diverged, model_state, "test").values())).all()


def test_metrics_are_those_that_the_runs_reach(make_task: Any):
    # Windows of a run of 24 snapshots reach 19 ahead.
    names = [metric.name for metric in make_task().metrics]
    assert names == ["forecast error", "runs", "architectures", "1 ahead", "5 ahead"]
    assert [metric.name for metric in make_task("wnn").metrics] == [*names[:3], "5 ahead"]
    assert not any(metric.higher_is_better for metric in make_task().metrics)


def test_evaluation_is_on_runs_of_the_split_alone(make_task: Any):
    task = make_task()
    for split, names in EVALUATED_SPLITS.items():
        for (batch, _), name in zip(task.evaluation_batches(split), names, strict=True):
            values = np.concatenate([run.snapshots.ravel() for run in task.trajectories[name]])
            assert np.isin(batch.windows.history, values).all()


def test_batches_are_fixed_and_evaluation_is_the_same_for_every_training_run(make_task: Any):
    task, again = make_task(), make_task(windows_per_role=3)
    jax.tree.map(np.testing.assert_array_equal, task.batch(3, 5), again.batch(3, 5))
    for other in (task.batch(4, 5), task.batch(3, 6)):
        assert np.any(task.batch(3, 5).windows.history != other.windows.history)
    first, other = (next(make_task(windows_per_role=n).evaluation_batches("validation")) for n in (2, 3))
    jax.tree.map(np.testing.assert_array_equal, first, other)


def test_its_description_is_that_of_the_content_of_all_runs(make_task: Any):
    task = make_task()
    description = task.describe()
    assert description == make_task().describe()
    for split, runs in task.trajectories.items():
        others = [run for name in SPLITS for run in task.trajectories[name] if run is not runs[-1]]
        fewer = make_task(trajectories=others).describe()
        assert [name for name in description if fewer[name] != description[name]] == [f"{split} runs"]
        with pytest.raises(UsageError, match=f"no finished run for '{split}'; collect more runs"):
            make_task(trajectories=[run for run in others if run.split != split])
