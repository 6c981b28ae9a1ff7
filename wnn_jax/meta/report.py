"""What a comparison found: a table, as text and as CSV, and a plot."""

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wnn_jax._files import replace_on_success

Result = dict[str, Any]

# What is evaluated in every run: the weights, and their exponential moving average.
READINGS = {"weights": "accuracy", "EMA": "accuracy_ema"}


def compare(results: Iterable[Result], target: float) -> list[dict[str, Any]]:
    """The table of a comparison: one row per arm and reading.

    The first arm is the reference: a speed-up is the ratio of its median to the row's, like with like (weights with
    weights, EMA with EMA). A run that does not reach the target counts as infinitely long, so that a median exists
    where most runs do.

    Args:
      results: the results of all runs, the reference arm's first.
      target: the validation accuracy whose reaching is timed.
    """
    rows = [_row(arm, runs, reading, target) for arm, runs in _by_arm(results).items() for reading in READINGS]
    references = {row["reading"]: row for row in rows[: len(READINGS)]}
    for row in rows:
        for unit in ("epochs", "seconds"):
            time, reference = row[f"{unit}_to_target"], references[row["reading"]][f"{unit}_to_target"]
            row[f"speedup_{unit}"] = reference / time if math.isfinite(time) and math.isfinite(reference) else math.nan
    return rows


def _row(arm: str, runs: list[Result], reading: str, target: float) -> dict[str, Any]:
    metric = READINGS[reading]
    suffix = metric.removeprefix("accuracy")
    epochs = [_first(run, metric, target, "epoch") for run in runs]
    final = [run["evaluations"][-1][metric] for run in runs]
    test = [run[f"test_accuracy{suffix}"] for run in runs]
    return {
        "arm": arm,
        "reading": reading,
        "runs": len(runs),
        "reached": sum(map(math.isfinite, epochs)),
        "epochs_to_target": statistics.median(epochs),
        "epochs_min": min(epochs),
        "epochs_max": max(epochs),
        "seconds_to_target": statistics.median(_first(run, metric, target, "seconds") for run in runs),
        "validation_mean": statistics.mean(final),
        "validation_std": _std(final),
        "test_mean": statistics.mean(test),
        "test_std": _std(test),
    }


def _first(run: Result, metric: str, target: float, unit: str) -> float:
    """Epochs or seconds until the metric first was at the target, or infinity."""
    return next((e[unit] for e in run["evaluations"] if e[metric] >= target), math.inf)


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def print_table(rows: list[dict[str, Any]], target: float, console: Console) -> None:
    """Shows the table on a terminal."""
    table = Table(
        title=f"Target: {target:.2%} on the validation images",
        caption="medians over seeds (min-max); final accuracies as mean ± std",
    )
    for heading in ("arm", "read from"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "reached",
        "epochs to target",
        "seconds",
        "speed-up",
        "in seconds",
        "validation %",
        "test %",
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        epochs = "never"
        if row["reached"]:
            epochs = f"{row['epochs_to_target']:.1f} ({row['epochs_min']:.1f}-{row['epochs_max']:.1f})"
        table.add_row(
            row["arm"],
            row["reading"],
            f"{row['reached']}/{row['runs']}",
            epochs.replace("inf", "never"),
            _or_dash(row["seconds_to_target"], "{:.1f}"),
            _or_dash(row["speedup_epochs"], "x{:.2f}"),
            _or_dash(row["speedup_seconds"], "x{:.2f}"),
            _mean_and_std(row, "validation"),
            _mean_and_std(row, "test"),
        )
    console.print(table)


def _mean_and_std(row: dict[str, Any], split: str) -> str:
    std = row[f"{split}_std"]
    return f"{100 * row[f'{split}_mean']:.2f}" + (f" ± {100 * std:.2f}" if math.isfinite(std) else "")


def _or_dash(value: float, template: str) -> str:
    return template.format(value) if math.isfinite(value) else "-"


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the table as CSV."""
    with replace_on_success(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def save_plot(results: Iterable[Result], target: float, path: Path) -> None:
    """Draws validation accuracy over epochs, mean and range over seeds per arm, with the jumps marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    by_arm = _by_arm(results)
    evaluations = [evaluation for runs in by_arm.values() for run in runs for evaluation in run["evaluations"]]
    top = max(evaluation[metric] for evaluation in evaluations for metric in READINGS.values())
    # Most of the first epochs, and the depths right after a jump, would squeeze what is to be compared.
    bottom = max(0.0, float(np.quantile([evaluation["accuracy"] for evaluation in evaluations], 0.2)) - 0.05)

    figure, axes = plt.subplots(1, len(READINGS), figsize=(13, 5.4), sharey=True, layout="constrained")
    for axis, (reading, metric) in zip(axes, READINGS.items(), strict=True):
        for color, (arm, runs) in enumerate(by_arm.items()):
            epochs = np.array([e["epoch"] for e in runs[0]["evaluations"]])
            accuracy = np.array([[e[metric] for e in run["evaluations"]] for run in runs])
            mean = accuracy.mean(axis=0)
            axis.plot(epochs, mean, color=f"C{color}", label=f"{arm} (n={len(runs)})", linewidth=1.5)
            axis.fill_between(epochs, accuracy.min(axis=0), accuracy.max(axis=0), color=f"C{color}", alpha=0.15, lw=0)
            jumps = np.flatnonzero(np.diff([0] + [e["num_nowcasts"] for e in runs[0]["evaluations"]]))
            heights = np.maximum(mean[jumps], bottom)  # Those below the axis are marked on it.
            axis.plot(epochs[jumps], heights, "v", color=f"C{color}", markersize=7, clip_on=False, in_layout=False)
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {target:.2%}")
        axis.plot([], [], "v", color="0.4", label="right after a nowcast")
        axis.set(xlabel="epoch", title=f"read from the {'weights' if reading == 'weights' else 'EMA of the weights'}")
        axis.set(ylim=(bottom, min(1.0, top + 0.01)))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy (mean, and range over seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def _by_arm(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each arm, in the order of their first appearance."""
    by_arm: dict[str, list[Result]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    return by_arm
