"""Judging nowcasters by the errors of their forecasts, on runs that they were neither trained on nor selected by."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

import wnn_jax
from wnn_jax._drift import Drift
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Trajectory, verified_trajectories
from wnn_jax.lab.forecasting.forecast_error import (
    ErrorRow,
    can_forecast,
    forecast_errors,
    plot_forecast_errors,
    say_what_is_left_out,
    share,
)
from wnn_jax.lab.forecasting.forecasting import EVALUATED_SPLITS, REPORTED_HORIZONS, name_of_horizon
from wnn_jax.lab.forecasting.nowcasters import NOWCASTER_HELP, load_nowcaster
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.task import EvaluationSplit

# The horizon of the figures by role, stage, spacing and task.
_HORIZON = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """Compare nowcasters by the errors of their forecasts, as shares of those of forecasting no change.

    All on the same runs: those of networks that one of them cannot forecast are left out, and named.
    """

    nowcasters: Annotated[tuple[str, ...], tyro.conf.arg(help=NOWCASTER_HELP, metavar="NOWCASTER [NOWCASTER ...]")]
    collection: tuple[Path, ...]
    """Folders of collected trajectories."""
    output: Path
    """Folder for the table `summary.csv`, the plot, and the errors of every run."""
    split: EvaluationSplit = "test"
    """Which runs to forecast: those of `test`, which no nowcaster was selected by, or those of `validation`."""
    average: bool = False
    """Forecast running means of the weights, with a memory of one spacing, as `nowcast(average=...)` does. Tables say
    `NAME+ema`, as the methods of comparisons do."""


def forecast(options: Forecast) -> list[dict[str, Any]]:
    """Measures forecast errors, and reports: a table, as text and as CSV, and a plot.

    Returns:
      The rows of the table, one per nowcaster.

    Raises:
      UsageError: if an option cannot be used, or a collection is damaged or has no such runs.
    """
    loaded: list[tuple[str, wnn_jax.Nowcaster, float]] = []
    for specification in options.nowcasters:
        label, nowcaster, scale = load_nowcaster(specification)
        if isinstance(nowcaster, Drift):
            raise UsageError(
                f"--nowcasters {specification}: a drift makes no forecast of snapshots; compare trainings with it, by: "
                "wnn-jax compare"
            )
        loaded.append((f"{label}+ema" if options.average else label, nowcaster, scale))
    labels = [label for label, _, _ in loaded]
    if not labels or len(set(labels)) < len(labels):
        raise UsageError(f"--nowcasters {' '.join(labels) or '(none)'} must name at least one, and none twice.")
    trajectories = _trajectories(options)
    forecast_by_all = [t for t in trajectories if all(can_forecast(nowcaster, t) for _, nowcaster, _ in loaded)]
    if not forecast_by_all:
        raise UsageError(f"--nowcasters {' '.join(labels)}: there is no run that all of them can forecast.")
    say_what_is_left_out(trajectories, forecast_by_all, "not all nowcasters can forecast them")
    trajectories = forecast_by_all
    errors: list[ErrorRow] = []
    rows: list[dict[str, Any]] = []
    with Progress("forecasts", total=len(loaded) * len(trajectories)) as progress:
        for label, nowcaster, scale in loaded:
            identity = {"method": label, "fingerprint": fingerprint(nowcaster)}
            rows_of_nowcaster: list[ErrorRow] = []
            for rows_of_run in forecast_errors(label, nowcaster, scale, trajectories, average=options.average):
                rows_of_nowcaster += [{**row, "fingerprint": identity["fingerprint"]} for row in rows_of_run]
                progress.advance()
            rows.append({**identity, **_summarize(rows_of_nowcaster, options.split)})
            errors += rows_of_nowcaster
    save_rows(errors, options.output / "forecast-errors.csv")
    save_rows(rows, options.output / "summary.csv")
    plot_forecast_errors(errors, options.output / "forecast-errors.png")
    _print(rows)
    return rows


def _trajectories(options: Forecast) -> list[Trajectory]:
    splits = EVALUATED_SPLITS[options.split]
    trajectories = [t for t in verified_trajectories(options.collection) if t.split in splits]
    if not trajectories:
        folders = " ".join(map(str, options.collection))
        raise UsageError(f"--collection {folders} has no finished run for {options.split!r}; collect more runs.")
    return trajectories


def _summarize(rows: Sequence[ErrorRow], split: EvaluationSplit) -> dict[str, float]:
    """Figure -> mean over runs of the error as a share of that of forecasting no change."""
    figures: dict[str, float] = {}
    known = {row["horizon"] for row in rows}
    # A nowcaster that takes no horizon has its own one only.
    reported, single = ((*known,), *known) if len(known) == 1 else (REPORTED_HORIZONS, _HORIZON)
    for name in EVALUATED_SPLITS[split]:
        for horizon in reported:
            figures[f"{name}, {name_of_horizon(horizon)}"] = share(rows, split=name, horizon=horizon)
    for column in ("role", "stage", "spacing", "task"):
        for value in sorted({row[column] for row in rows}):
            name = f"{split} {column} {value}, {name_of_horizon(single)}"
            figures[name] = share(rows, horizon=single, **{column: value})
    return figures


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Shows the table on a terminal, with nowcasters as columns: there are more figures than nowcasters."""
    table = Table(
        title="Forecast errors, as shares of those of forecasting no change",
        caption="means over runs, each of sums over its windows and weights",
    )
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["method"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("method", "fingerprint")):
        values = [row.get(name, math.nan) for row in rows]
        if any(map(math.isfinite, values)):
            table.add_row(name, *(f"{value:.3f}" if math.isfinite(value) else "-" for value in values))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
