"""Judging nowcasters: by the error of their forecasts, and by the training that they save."""

import csv
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from wnn_jax._files import replace_on_success
from wnn_jax.meta import forecast_error
from wnn_jax.meta.architectures import ARCHITECTURES
from wnn_jax.meta.arms import ARM_HELP, Arm, parse_arms
from wnn_jax.meta.comparison import default_target, run_arms
from wnn_jax.meta.datasets import load_dataset
from wnn_jax.meta.end_to_end import Task
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.progress import Progress
from wnn_jax.meta.report import READINGS, compare, save_plot
from wnn_jax.meta.trajectories import Collection


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEndTask:
    """A training that nowcasters are to shorten. Its architecture is in no family of tasks to collect.

    Attributes:
      architecture: a name in `ARCHITECTURES`.
      dataset: a name in `DATASETS`.
      learning_rate: Adam's.
      batch_size: examples per step.
      num_epochs: length of a run.
      snapshot_every: steps between snapshots, and between evaluations.
    """

    architecture: str
    dataset: str
    learning_rate: float
    batch_size: int
    num_epochs: int
    snapshot_every: int


def _three_conv(learning_rate: float) -> EndToEndTask:
    return EndToEndTask(
        architecture="three-conv",
        dataset="cifar10",
        learning_rate=learning_rate,
        batch_size=128,
        num_epochs=17,
        snapshot_every=200,
    )


END_TO_END_TASKS: Mapping[str, EndToEndTask] = {
    # The task C10/16 of Knyazev et al., ICLR 2025, in 6,103 of its 10,000 steps: at its rate, and at higher ones.
    "three-conv-3e-3": _three_conv(3e-3),
    "three-conv-6e-3": _three_conv(6e-3),
    "three-conv-1e-2": _three_conv(1e-2),
    # Seconds, and no download.
    "digits-1e-2": EndToEndTask(
        architecture="three-conv",
        dataset="digits",
        learning_rate=1e-2,
        batch_size=32,
        num_epochs=40,
        snapshot_every=28,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare nowcasters: errors of their forecasts, and training saved, in one table."""

    nowcasters: Annotated[tuple[str, ...], tyro.conf.arg(help=ARM_HELP, metavar="ARM [ARM ...]")]
    output: Path
    """Folder for the table, the plot, the errors and the runs. Runs that are there are kept."""
    collection: tuple[Path, ...] = ()
    """Folders of collected trajectories, whose held-out runs are forecast. Default: no forecasts."""
    tasks: tuple[str, ...] = ()
    """Trainings to shorten: three-conv-3e-3, three-conv-6e-3, three-conv-1e-2 (CIFAR-10), digits-1e-2 (no download)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one run per arm and task."""
    num_epochs: int | None = None
    """Length of these runs. Default: each task's own."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""


def evaluate(options: Evaluate) -> list[dict[str, Any]]:
    """Evaluates nowcasters.

    Returns:
      The rows of the table, one per arm.

    Raises:
      UsageError: if an option cannot be used.
    """
    if not options.collection and not options.tasks:
        raise UsageError("there is nothing to evaluate: give --collection, --tasks, or both.")
    if unknown := sorted(set(options.tasks) - set(END_TO_END_TASKS)):
        raise UsageError(f"--tasks {' '.join(unknown)}: choose from {', '.join(END_TO_END_TASKS)}.")
    arms = parse_arms(options.nowcasters)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"arm": arm.label} for arm in arms]
    if options.collection:
        _add_forecast_errors(rows, arms, options.collection, options.output)
    for name in options.tasks:
        _add_end_to_end(rows, arms, name, options)
    _save(rows, options.output / "summary.csv")
    _print(rows)
    return rows


def _add_forecast_errors(
    rows: list[dict[str, Any]], arms: tuple[Arm, ...], collections: tuple[Path, ...], output: Path
) -> None:
    trajectories = [t for folder in collections for t in Collection(folder).trajectories() if t.split != "train"]
    if not trajectories:
        folders = " ".join(map(str, collections))
        raise UsageError(f"--collection {folders} has no finished run that was held out; collect more runs.")
    errors: list[forecast_error.Row] = []
    with Progress("forecasts", total=len(arms) * len(trajectories)) as progress:
        for row, arm in zip(rows, arms, strict=True):
            if arm.nowcaster is None:
                progress.advance(len(trajectories))
                continue
            mine: list[forecast_error.Row] = []
            for found in forecast_error.forecast_errors(arm.label, arm.nowcaster, arm.scale, trajectories):
                mine += found
                progress.advance()
            errors += mine
            for split in dict.fromkeys(error["split"] for error in mine):
                for horizon in (1, 5, 20, 40):
                    share = forecast_error.share(mine, split=split, horizon=horizon)
                    row[f"{split}, {horizon} ahead"] = share
            for kind in ("role", "stage", "spacing", "task"):
                for value in sorted({error[kind] for error in mine}):
                    row[f"{kind} {value}, 5 ahead"] = forecast_error.share(mine, horizon=5, **{kind: value})
    _save(errors, output / "forecast-errors.csv")
    forecast_error.save_plot(errors, output / "forecast-errors.png")


def _add_end_to_end(rows: list[dict[str, Any]], arms: tuple[Arm, ...], name: str, options: Evaluate) -> None:
    chosen = END_TO_END_TASKS[name]
    dataset = load_dataset(chosen.dataset, options.data_dir)
    task = Task(
        dataset=dataset,
        model=ARCHITECTURES[chosen.architecture](dataset.num_classes),
        augment=None,
        batch_size=chosen.batch_size,
        num_epochs=options.num_epochs or chosen.num_epochs,
        learning_rate=chosen.learning_rate,
        snapshot_every=chosen.snapshot_every,
        evaluate_every=chosen.snapshot_every,
        ema_decay=0.99,
    )
    folder = options.output / name
    results = run_arms(task, arms, options.seeds, folder, Console(), resume=True, checkpoint_seconds=30.0)
    target = default_target(results)
    save_plot(results, target, folder / "curves.png")
    by_arm = {(row["arm"], row["reading"]): row for row in compare(results, target)}
    for row in rows:
        for reading in READINGS:
            found = by_arm[row["arm"], reading]
            row[f"{name}, {reading}: epochs"] = found["epochs_to_target"]
            row[f"{name}, {reading}: steps saved"] = 1 - 1 / found["speedup_epochs"]
            row[f"{name}, {reading}: final"] = found["validation_mean"]


def _save(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replace_on_success(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """Nothing for a figure that does not exist, such as the time to a target that was not reached."""
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""


def _print(rows: list[dict[str, Any]]) -> None:
    """The table, with arms as columns: there are more figures than arms."""
    table = Table(
        title="Errors are shares of those of forecasting no change; steps saved are medians over seeds",
        caption="the target of a training is the lowest final validation accuracy of the first arm's runs",
    )
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["arm"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row if name != "arm"):
        values = [row.get(name, math.nan) for row in rows]
        table.add_row(name, *(f"{value:.3f}" if math.isfinite(value) else "-" for value in values))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def read_summary(path: Path) -> dict[str, dict[str, float]]:
    """The table that `evaluate` saved: arm -> figure -> value."""
    with path.open(newline="") as file:
        return {
            row["arm"]: {name: float(value) for name, value in row.items() if name != "arm" and value}
            for row in csv.DictReader(file)
        }
