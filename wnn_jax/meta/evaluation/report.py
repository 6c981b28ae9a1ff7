"""The table of a comparison on a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from wnn_jax.meta.evaluation.summary import Row
from wnn_jax.meta.tasks.task import Metric


def print_table(rows: Sequence[Row], metrics: Sequence[Metric], console: Console) -> None:
    """Shows the table of a comparison on a terminal."""
    reference = next(row for row in rows if row["is_reference"])
    target = metrics[0]
    table = Table(
        title=f"Steps saved to {target.name} {format(reference['target'], target.format)}: the best that "
        f"{reference['arm']!r} has, the best plain arm",
        caption="means over seeds, with 95 % bootstrap intervals or standard deviations; every arm at its own best "
        "learning rate and reading, both chosen on the validation split; * the best rate is at the edge of the grid",
    )
    for heading in ("arm", "rate", "read from"):
        table.add_column(heading, overflow="fold")
    scores = [f"validation {metric.name}" for metric in metrics]
    for heading in ("steps saved %", "reached", *scores, f"test {target.name}", "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        best = row["reading"]
        table.add_row(
            row["arm"],
            f"{row['learning_rate']:g}{'*' if row['is_at_edge'] else ''}",
            best,
            _steps_saved(row),
            f"{row['reached']}/{row['runs']}",
            *(_mean_and_std(row, f"{best}: {metric.name}", metric) for metric in metrics),
            _mean_and_std(row, f"test: {target.name}", target),
            f"{row['seconds']:.1f}",
        )
    console.print(table)


def _steps_saved(row: Row) -> str:
    if not row["reached"]:
        return "none"
    bound = "at most " if row["reached"] < row["runs"] else ""
    interval = ""
    if math.isfinite(row["steps_saved_low"]):
        interval = f" ({100 * row['steps_saved_low']:.0f} to {100 * row['steps_saved_high']:.0f})"
    return f"{bound}{100 * row['steps_saved']:.0f}{interval}"


def _mean_and_std(row: Row, name: str, metric: Metric) -> str:
    if not math.isfinite(row[name]):
        return "diverged"
    std = row[f"{name} std"]
    return format(row[name], metric.format) + (f" ± {format(std, metric.format)}" if math.isfinite(std) else "")
