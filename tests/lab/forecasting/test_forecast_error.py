from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

import wnn_jax
from tests.lab.conftest import tiny_family
from wnn_jax.lab.forecasting.collection import Collection, Trajectory
from wnn_jax.lab.forecasting.forecast_error import HORIZONS, forecast_errors, plot_forecast_errors, share

LINEAR = wnn_jax.nowcasters.CurveFit("linear")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """A run whose weights all move at a speed of their own."""
    collection = Collection.create(tmp_path_factory.mktemp("straight"), tiny_family())
    speed = np.random.default_rng(0).normal(size=[6, 5]).astype(np.float32)
    snapshots = [{"Dense_0": {"kernel": 1 + time * speed, "bias": time * speed[0]}} for time in range(120)]
    collection.save(0, tiny_family().settings(0), "validation", snapshots, [1.0] * 120, {"loss": 1.0})
    return collection.trajectories()


def errors_of(nowcaster: wnn_jax.Nowcaster, runs: list[Trajectory], scale: float = 1.0) -> list[dict[str, Any]]:
    return [row for rows in forecast_errors("it", nowcaster, scale, runs) for row in rows]


def test_a_straight_line_is_forecast_by_a_line(straight: list[Trajectory]):
    rows = errors_of(LINEAR, straight)
    assert {row["horizon"] for row in rows} == set(HORIZONS)
    assert {row["role"] for row in rows} == {"bias", "dense"}
    assert {row["stage"] for row in rows} == {"early", "middle", "late"}
    for horizon in HORIZONS:
        assert share(rows, horizon=horizon) == pytest.approx(0, abs=1e-4)
    halfway = errors_of(LINEAR, straight, scale=0.5)
    assert share(halfway, horizon=5, role="dense") == pytest.approx(0.5, abs=1e-4)


def test_running_means_are_forecast_where_wanted(tmp_path: Path):
    """Of noise around nothing the mean moves less, so that forecasting that it goes back costs less."""
    noise = np.random.default_rng(0).normal(size=[120, 400]).astype(np.float32)
    collection = Collection.create(tmp_path, tiny_family())
    snapshots = [{"Dense_0": {"bias": row}} for row in noise]
    collection.save(0, tiny_family().settings(0), "validation", snapshots, [1.0] * 120, {"loss": 1.0})
    runs = collection.trajectories()
    mean, single = (
        sum(row["no_change"] for rows in forecast_errors("it", LINEAR, 1.0, runs, average=average) for row in rows)
        for average in (True, False)
    )
    # White noise of variance 1 has a mean of variance (1 - decay) / (1 + decay), with memories of 2 and of 8.
    sizes = [np.sqrt((1 - decay) / (1 + decay)) for decay in np.exp([-1 / 2, -1 / 8])]
    assert mean / single == pytest.approx(np.mean(sizes), rel=0.15)


def test_no_change_has_a_share_of_one(straight: list[Trajectory]):
    rows = errors_of(wnn_jax.leafwise(lambda history, role, horizon: history[-1]), straight)
    assert share(rows) == pytest.approx(1)
    assert np.isnan(share(rows, horizon=6))


def test_a_nowcaster_without_horizon_is_judged_at_its_own(straight: list[Trajectory], wnn: Any):
    assert {row["horizon"] for row in errors_of(wnn, straight)} == {5}

    class Doubled:
        """Forecasts a straight line from the first and the last of its snapshots, which are not evenly spaced."""

        context, offsets, default_horizon, takes_horizon = 4, (0, 4, 7, 10), 10, False

        def __call__(self, history: Any, roles: Any, horizon: Any) -> Any:
            return {name: 2 * history[3][name] - history[0][name] for name in history[0]}

    rows = errors_of(Doubled(), straight)
    assert {row["horizon"] for row in rows} == {10}
    assert share(rows) == pytest.approx(0, abs=1e-4)


def test_errors_are_drawn(straight: list[Trajectory], tmp_path: Path):
    plot_forecast_errors(errors_of(LINEAR, straight), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_every_nowcaster_is_within_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shares = {"exact": 0.0, "good": 0.9, "bad": 4.6, "useless": 1e9}
    rows = [
        {"nowcaster": label, "run": "0", "split": "test", "horizon": horizon, "error": value, "no_change": 1.0}
        for label, value in shares.items()
        for horizon in HORIZONS
    ]
    monkeypatch.setattr(plt, "close", lambda _: None)
    plot_forecast_errors(rows, tmp_path / "errors.png")
    figure = plt.gcf()
    monkeypatch.undo()
    low, high = figure.axes[0].get_ylim()
    assert high < 10
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert set(drawn) == {*shares, "last value"}
    assert all(low <= values.min() <= values.max() <= high for values in drawn.values())
    plt.close(figure)
