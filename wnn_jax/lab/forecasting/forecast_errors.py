"""Errors of forecasts on whole runs: by horizon, role, stage of training and spacing, as a table and a plot."""

import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import wnn_jax
from wnn_jax._drift import Drift
from wnn_jax._store import fingerprint
from wnn_jax._window import DEFAULT_HORIZON
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.forecasting_task import EVALUATED_SPLITS, REPORTED_HORIZONS, name_of_horizon
from wnn_jax.lab.forecasting.nowcasters import NOWCASTER_HELP, load_nowcaster
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories
from wnn_jax.lab.forecasting.windows import MIN_HORIZON, read_window
from wnn_jax.lab.output import add_legend, new_figure, save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.task import EvaluationSplit

HORIZONS = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40)
# The horizon of the figures by role, stage, spacing and task.
_HORIZON = 5
_STRIDES = (2, 8)
# Of the plot: the range of the errors, and the errors that the axis names.
_SHOWN = (0.1, 5.0)
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0)

ErrorRow = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """Compare nowcasters by the errors of their forecasts, relative to forecasting no change.

    All forecast the same runs. Runs of networks that one of them cannot forecast are left out, and named.
    """

    nowcasters: Annotated[tuple[str, ...], tyro.conf.arg(help=NOWCASTER_HELP, metavar="NOWCASTER [NOWCASTER ...]")]
    collection: tuple[Path, ...]
    """Folders of collected trajectories."""
    output: Path
    """Folder for the table `summary.csv`, the plot, and the errors of every run."""
    split: EvaluationSplit = "test"
    """Runs to forecast: `test`, on which no nowcaster was selected, or `validation`."""


def forecast(options: Forecast) -> list[dict[str, Any]]:
    """Measure forecast errors, report them as text, as CSV and as a plot, and return one row per nowcaster."""
    nowcasters: dict[str, tuple[wnn_jax.Nowcaster, float]] = {}
    for specification in options.nowcasters:
        label, nowcaster, scale = load_nowcaster(specification)
        if isinstance(nowcaster, Drift):
            raise UsageError(
                f"--nowcasters {specification}: a drift forecasts no snapshots. Compare training runs with it: "
                "wnn-jax compare"
            )
        nowcasters[label] = nowcaster, scale
    labels = " ".join(options.nowcasters) or "(none)"
    if len(nowcasters) < max(len(options.nowcasters), 1):
        raise UsageError(f"--nowcasters {labels} must name at least one, and none twice.")
    splits = EVALUATED_SPLITS[options.split]
    trajectories = [run for run in load_trajectories(options.collection) if run.split in splits]
    used = [run for run in trajectories if all(can_forecast(nowcaster, run) for nowcaster, _ in nowcasters.values())]
    if not used:
        raise UsageError(
            f"--nowcasters {labels}: --collection has no finished run for {options.split!r} that all of them can "
            f"forecast; {'leave some nowcasters out' if trajectories else 'collect more runs'}."
        )
    if left_out := {run.settings.architecture for run in trajectories} - {run.settings.architecture for run in used}:
        names = ", ".join(sorted(left_out))
        Console().print(f"left out, because not all nowcasters can forecast them: {names}", soft_wrap=True)
    errors: list[ErrorRow] = []
    rows: list[dict[str, Any]] = []
    with Progress("forecasts", total=len(nowcasters) * len(used)) as progress:
        for label, (nowcaster, scale) in nowcasters.items():
            checksum = fingerprint(nowcaster)
            own: list[ErrorRow] = []
            for rows_of_run in forecast_errors(label, nowcaster, scale, used):
                own += [{**row, "fingerprint": checksum} for row in rows_of_run]
                progress.advance()
            rows.append({"method": label, "fingerprint": checksum, **_summarize(own, options.split)})
            errors += own
    save_rows(errors, options.output / "forecast-errors.csv")
    save_rows(rows, options.output / "summary.csv")
    plot_forecast_errors(errors, options.output / "forecast-errors.png")
    _print(rows)
    return rows


def forecast_errors(
    label: str, nowcaster: wnn_jax.Nowcaster, scale: float, trajectories: Iterable[Trajectory]
) -> Iterator[list[ErrorRow]]:
    """Measure the errors of a nowcaster at the beginning, the middle and the end of runs, at two spacings.

    For every run, yield one row per role, stage, spacing and horizon: the sum of absolute errors, and the same sum for
    forecasting no change. A nowcaster without horizons has rows for its own horizon only.
    """
    context = nowcaster.context
    takes_horizon = getattr(nowcaster, "takes_horizon", True)
    horizons = HORIZONS if takes_horizon else (getattr(nowcaster, "default_horizon", DEFAULT_HORIZON),)

    @functools.partial(jax.jit, static_argnums=2)
    def predict(history: Any, horizon: Any, roles: tuple[tuple[str, str], ...]) -> Any:
        return nowcaster(history, dict(roles), horizon if takes_horizon else None)

    for run in trajectories:
        rows: list[ErrorRow] = []
        roles = tuple((leaf.name, leaf.role) for leaf in run.leaves)
        of_run = {
            "nowcaster": label,
            "run": f"{run.family.name} {run.index}",
            "split": run.split,
            "task": f"{run.settings.architecture} on {run.settings.dataset}",
            "optimizer": run.settings.optimizer,
        }
        for stage, start, stride in _places(run, context - 1 + max(MIN_HORIZON, horizons[0])):
            windows = [read_window(run, leaf, start, stride, context) for leaf in run.leaves]
            history = [
                {leaf.name: past[time].reshape(leaf.shape) for leaf, (past, _) in zip(run.leaves, windows, strict=True)}
                for time in range(context)
            ]
            history = jax.device_put(history)  # Once for all horizons.
            for horizon in (horizon for horizon in horizons if horizon <= len(windows[0][1])):
                forecasts = jax.device_get(predict(history, jnp.int32(horizon), roles))
                sums: dict[str, list[float]] = {}
                for leaf, (past, future) in zip(run.leaves, windows, strict=True):
                    last, actual = past[-1], future[horizon - 1]
                    predicted = last + scale * (forecasts[leaf.name].reshape(-1) - last)
                    total = sums.setdefault(leaf.role, [0.0, 0.0])
                    total[0] += float(np.abs(predicted - actual).sum(dtype=np.float64))
                    total[1] += float(np.abs(last - actual).sum(dtype=np.float64))
                spacing = stride * run.settings.snapshot_every
                row = {**of_run, "stage": stage, "spacing": spacing, "horizon": horizon}
                for role, (error, no_change) in sums.items():
                    rows.append({**row, "role": role, "error": error, "no_change": no_change})
        yield rows


def can_forecast(nowcaster: wnn_jax.Nowcaster, run: Trajectory) -> bool:
    """Return whether a nowcaster can forecast the network of a run. NiNo needs a graph that it can read."""
    shapes = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in run.leaves}
    try:
        getattr(nowcaster, "check_params", lambda *_: None)(shapes, {leaf.name: leaf.role for leaf in run.leaves})
    except ValueError:
        return False
    return True


def relative_error(rows: Iterable[ErrorRow], **columns: Any) -> float:
    """Return the mean over runs of the error relative to forecasting no change, NaN if no row has these values."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in columns.items()):
            total = sums.setdefault((row["split"], row["run"]), [0.0, 0.0])
            total[0] += row["error"]
            total[1] += row["no_change"]
    errors = [error / no_change for error, no_change in sums.values() if no_change > 0]
    return statistics.mean(errors) if errors else math.nan


def plot_forecast_errors(rows: Sequence[ErrorRow], path: Path) -> None:
    """Draw the error against the horizon for every nowcaster, in a PNG file."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    size = (6.5 * len(splits), 5)
    with new_figure(path, 1, len(splits), figsize=size, sharey=True, squeeze=False) as (figure, axes):
        for axis, split in zip(axes[0], splits, strict=True):
            number = len({row["run"] for row in rows if row["split"] == split})
            axis.set(xscale="log", yscale="log", xlabel="horizon in snapshots", title=f"{split} (n={number})")
            axis.set_xticks(HORIZONS, [str(horizon) for horizon in HORIZONS])
            axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
            axis.minorticks_off()
            for color, label in enumerate(dict.fromkeys(row["nowcaster"] for row in rows)):
                drawn = [row for row in rows if row["nowcaster"] == label and row["split"] == split]
                horizons = sorted({row["horizon"] for row in drawn})
                errors = [relative_error(drawn, horizon=horizon) for horizon in horizons]
                # A single dot must not hide in the line of another nowcaster.
                marker = {"marker": "o", "markersize": 4} if len(horizons) > 1 else {"marker": "D", "fillstyle": "none"}
                axis.plot(horizons, np.clip(errors, *_SHOWN), color=f"C{color}", label=label, clip_on=False, **marker)
            axis.axhline(1.0, color="0.4", linestyle=":", linewidth=1, label="no change")
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel(f"error relative to no change ({_SHOWN[1]:g}: or more)")
        add_legend(figure, *axes[0, 0].get_legend_handles_labels(), fontsize=9)


def _places(run: Trajectory, length: int) -> list[tuple[str, int, int]]:
    """Return stage, first snapshot and stride of windows that are `length` strides long."""
    places: list[tuple[str, int, int]] = []
    for stride in _STRIDES:
        num_starts = len(run.snapshots) - length * stride
        if num_starts > 0:
            last = num_starts - 1
            places += [("early", 0, stride), ("middle", int(0.5 * last), stride), ("late", last, stride)]
    return places


def _summarize(rows: Sequence[ErrorRow], split: EvaluationSplit) -> dict[str, float]:
    """Return the figures of a nowcaster by name."""
    figures: dict[str, float] = {}
    measured = {row["horizon"] for row in rows}
    # A nowcaster without horizons has its own horizon only.
    reported, single = (REPORTED_HORIZONS, _HORIZON) if len(measured) > 1 else (measured, max(measured, default=0))
    for name in EVALUATED_SPLITS[split]:
        for horizon in reported:
            figures[f"{name}, {name_of_horizon(horizon)}"] = relative_error(rows, split=name, horizon=horizon)
    for column in ("role", "stage", "spacing", "task"):
        for value in sorted({row[column] for row in rows}):
            name = f"{split} {column} {value}, {name_of_horizon(single)}"
            figures[name] = relative_error(rows, horizon=single, **{column: value})
    return figures


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Show the table on a terminal, one column per nowcaster."""
    caption = "means over runs; in a run, errors are summed over windows and weights"
    table = Table(title="Forecast errors relative to forecasting no change", caption=caption)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["method"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("method", "fingerprint")):
        values = [row.get(name, math.nan) for row in rows]
        if any(map(math.isfinite, values)):
            table.add_row(name, *(f"{value:.3f}" if math.isfinite(value) else "-" for value in values))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
