"""The table of a comparison on a terminal."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from wnn_jax.meta.evaluation.summary import Row
from wnn_jax.meta.tasks.task import Metric

# More metrics than these make a table that is too wide; the CSV has all.
_NUM_SHOWN = 2


def print_table(
    rows: Sequence[Row], metrics: Sequence[Metric], console: Console, *, has_own_target: bool = False
) -> None:
    """Shows the table of a comparison on a terminal.

    Args:
      rows: of the table.
      metrics: of the task, the target first.
      console: where to.
      has_own_target: whether the target was given, rather than taken from the reference.
    """
    reference = next(row for row in rows if row["is_reference"])
    target = metrics[0]
    value = format(reference["target"], target.format) if math.isfinite(reference["target"]) else "none"
    origin = "" if has_own_target else f", the best score of {reference['arm']!r} (mean over seeds)"
    edge = "; *: the best rate is at the edge of the grid" if any(row["is_at_edge"] for row in rows) else ""
    table = Table(
        title=f"Steps saved to {target.name} {value}{origin}",
        caption="steps saved: mean over seeds and 95 % bootstrap interval, by whichever reading is there first; "
        "scores: mean ± standard deviation at the end, of the reading that is best there; rates and readings are "
        f"chosen on the validation split; seconds: of training steps{edge}",
    )
    for heading in ("arm", "rate", "read from"):
        table.add_column(heading, no_wrap=True)
    shown = metrics[:_NUM_SHOWN]
    scores = [f"validation {metric.name}" for metric in shown]
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
            *(_mean_and_std(row, f"{best}: {metric.name}", metric) for metric in shown),
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
