import csv
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import wnn_jax
from tests.lab.conftest import tiny_family
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.forecast_errors import (
    HORIZONS,
    Forecast,
    forecast,
    forecast_errors,
    plot_forecast_errors,
    relative_error,
)
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories, save_trajectory

LINEAR = wnn_jax.nowcasters.CurveFit("linear")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """A run whose weights all move at a speed of their own."""
    folder = tmp_path_factory.mktemp("straight")
    speed = np.random.default_rng(0).normal(size=[6, 5]).astype(np.float32)
    snapshots = [{"Dense_0": {"kernel": 1 + time * speed, "bias": time * speed[0]}} for time in range(120)]
    save_trajectory(folder, tiny_family(), 0, snapshots, [1.0] * 120, {"loss": 1.0})
    return load_trajectories([folder])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "mine.npz"
    wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0), ("bias", "dense")), path)
    return path


def errors_of(nowcaster: wnn_jax.Nowcaster, runs: list[Trajectory], scale: float = 1.0) -> list[dict[str, Any]]:
    return [row for rows in forecast_errors("it", nowcaster, scale, runs) for row in rows]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_straight_line_is_forecast_by_a_line(straight: list[Trajectory]):
    rows = errors_of(LINEAR, straight)
    assert {row["horizon"] for row in rows} == set(HORIZONS)
    assert {row["role"] for row in rows} == {"bias", "dense"}
    assert {row["stage"] for row in rows} == {"early", "middle", "late"}
    for horizon in HORIZONS:
        assert relative_error(rows, horizon=horizon) == pytest.approx(0, abs=1e-4)
    assert np.isnan(relative_error(rows, horizon=6))
    assert relative_error(errors_of(LINEAR, straight, scale=0.0)) == pytest.approx(1)
    halfway = errors_of(LINEAR, straight, scale=0.5)
    assert relative_error(halfway, horizon=5, role="dense") == pytest.approx(0.5, abs=1e-4)


def test_a_nowcaster_without_horizon_is_judged_at_its_own(straight: list[Trajectory], wnn: Any):
    assert {row["horizon"] for row in errors_of(wnn, straight)} == {5}

    class Doubled:
        """Forecasts a straight line from the first and the last of three snapshots."""

        context, default_horizon, takes_horizon = 3, 2, False

        def __call__(self, history: Any, roles: Any, horizon: Any) -> Any:
            return {name: 2 * history[2][name] - history[0][name] for name in history[0]}

    rows = errors_of(Doubled(), straight)
    assert {row["horizon"] for row in rows} == {2}
    assert relative_error(rows) == pytest.approx(0, abs=1e-4)


def test_every_nowcaster_is_within_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors = {"exact": 0.0, "good": 0.9, "bad": 4.6, "useless": 1e9}
    rows = [
        {"nowcaster": label, "run": "0", "split": "test", "horizon": horizon, "error": value, "no_change": 1.0}
        for label, value in errors.items()
        for horizon in HORIZONS
    ]
    monkeypatch.setattr(plt, "close", lambda _: None)
    plot_forecast_errors(rows, tmp_path / "errors.png")
    figure = plt.gcf()
    monkeypatch.undo()
    low, high = figure.axes[0].get_ylim()
    assert high < 10
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert set(drawn) == {*errors, "no change"}
    assert all(low <= values.min() <= values.max() <= high for values in drawn.values())
    plt.close(figure)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_table_has_the_errors_of_the_split_alone(collection: Path, saved: Path, tmp_path: Path, split: Any):
    assert Forecast.split == "test"  # On which no nowcaster was selected.
    nowcasters = ("linear", "linear@0.5", f"{saved}@0")
    rows = forecast(Forecast(nowcasters=nowcasters, collection=(collection,), output=tmp_path, split=split))
    assert [row["method"] for row in rows] == ["linear", "linear@0.5", "mine@0"]
    table = {row["method"]: row for row in read_csv(tmp_path / "summary.csv")}
    assert table["mine@0"]["fingerprint"] == fingerprint(wnn_jax.load(saved))
    assert table["linear"]["fingerprint"] == table["linear@0.5"]["fingerprint"]
    for name in (f"{split}, 5 ahead", f"{split} architecture, 5 ahead", f"{split} stage late, 5 ahead"):
        assert float(table["linear"][name]) > 0
        # A jump of no size is a forecast of no change.
        assert float(table["mine@0"][name]) == pytest.approx(1)
    errors = read_csv(tmp_path / "forecast-errors.csv")
    assert {row["split"] for row in errors} == {split, f"{split} architecture"}
    assert {row["fingerprint"] for row in errors} == {row["fingerprint"] for row in table.values()}
    assert (tmp_path / "forecast-errors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("nowcasters", "message"),
    [
        ((), r"--nowcasters \(none\) must name at least one, and none twice"),
        (("linear", "linear"), "--nowcasters linear linear must name at least one, and none twice"),
        (("best",), "the nowcaster 'best' cannot be used: .*not known"),
        (("drift",), "--nowcasters drift: a drift forecasts no snapshots"),
    ],
)
def test_bad_nowcasters_are_named(collection: Path, tmp_path: Path, nowcasters: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        forecast(Forecast(nowcasters=nowcasters, collection=(collection,), output=tmp_path))
    assert not list(tmp_path.iterdir())


def test_all_nowcasters_forecast_the_same_runs(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A nowcaster that refuses a network leaves its runs out for all nowcasters."""

    def check_params(self: Any, params: Any, roles: Any) -> None:
        if refused & set(roles.values()):
            raise ValueError

    refused = {"conv"}
    monkeypatch.setattr(wnn_jax.nowcasters.CurveFit, "check_params", check_params, raising=False)
    options = Forecast(nowcasters=("linear", "wnn"), collection=(collection,), output=tmp_path)
    forecast(options)
    assert "not all nowcasters can forecast them: cnn-8-16" in capsys.readouterr().out
    errors = read_csv(tmp_path / "forecast-errors.csv")
    assert {(row["nowcaster"], row["split"]) for row in errors} == {("linear", "test"), ("wnn", "test")}
    refused = {"dense"}
    with pytest.raises(UsageError, match="wnn: --collection has no finished run for 'test' that all of them can"):
        forecast(options)
