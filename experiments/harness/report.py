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

    The first arm, read from its weights, is the reference: speed-ups are ratios of its medians to the row's. A
    run that does not reach the target counts as infinitely long, so that a median exists where most runs do.

    Args:
      results: the results of all runs, the reference arm's first.
      target: the validation accuracy whose reaching is timed.
    """
    by_arm: dict[str, list[Result]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    rows = [_row(arm, runs, reading, target) for arm, runs in by_arm.items() for reading in READINGS]
    reference = rows[0]
    for row in rows:
        for unit in ("epochs", "seconds"):
            time, reference_time = row[f"{unit}_to_target"], reference[f"{unit}_to_target"]
            row[f"speedup_{unit}"] = reference_time / time if math.isfinite(time) else math.nan
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
    table = Table(title=f"Target: {target:.2%} on the validation images", caption="medians over seeds; mean ± std")
    for heading in ("arm", "read from"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "reached",
        "epochs to target",
        "seconds to target",
        "speed-up in epochs",
        "speed-up in seconds",
        "final validation",
        "final test",
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        epochs = f"{row['epochs_to_target']:.1f} ({row['epochs_min']:.1f} to {row['epochs_max']:.1f})"
        table.add_row(
            row["arm"],
            row["reading"],
            f"{row['reached']} of {row['runs']}",
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
    return f"{row[f'{split}_mean']:.2%}" + (f" ± {std:.2%}" if math.isfinite(std) else "")


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

    by_arm: dict[str, list[Result]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    figure, axes = plt.subplots(1, len(READINGS), figsize=(13, 5), sharey=True, layout="constrained")
    for axis, (reading, metric) in zip(axes, READINGS.items(), strict=True):
        for index, (arm, runs) in enumerate(by_arm.items()):
            epochs = [e["epoch"] for e in runs[0]["evaluations"]]
            accuracy = np.array([[e[metric] for e in run["evaluations"]] for run in runs])
            mean = accuracy.mean(axis=0)
            axis.plot(epochs, mean, color=f"C{index}", label=f"{arm} (n={len(runs)})", linewidth=1.5)
            axis.fill_between(epochs, accuracy.min(axis=0), accuracy.max(axis=0), color=f"C{index}", alpha=0.15, lw=0)
            nowcasts = np.diff([0] + [e["num_nowcasts"] for e in runs[0]["evaluations"]])
            jumps = np.flatnonzero(nowcasts)
            axis.plot(np.array(epochs)[jumps], mean[jumps], "v", color=f"C{index}", markersize=6)
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {target:.2%}")
        axis.set(xlabel="epoch", title=f"read from the {'weights' if reading == 'weights' else 'EMA of the weights'}")
        axis.grid(alpha=0.3)
    # The first epochs from chance would squeeze what is to be compared.
    finals = [e["accuracy"] for result in results for e in result["evaluations"][len(result["evaluations"]) // 4 :]]
    top = max(max(e["accuracy"], e["accuracy_ema"]) for result in results for e in result["evaluations"])
    axes[0].set_ylim(max(0.0, float(np.quantile(finals, 0.02)) - 0.03), min(1.0, top + 0.01))
    axes[0].set_ylabel("validation accuracy (mean, and range over seeds)")
    axes[0].plot([], [], "v", color="0.4", label="nowcast")
    axes[0].legend(fontsize=9, loc="lower right")
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
