"""Tables of comparisons on a terminal."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from wnn_jax.lab.comparing.summary import Row
from wnn_jax.lab.tasks.task import Metric

# More metrics than these make the table too wide. The CSV file has all of them.
_NUM_METRICS = 2
_CELL_WIDTH = 12


def print_table(
    rows: Sequence[Row], metrics: Sequence[Metric], console: Console, *, has_own_target: bool = False
) -> None:
    """Print the table of a comparison. The first metric is the target, which may have been given as a value."""
    reference = next(row for row in rows if row["is_reference"])
    target = metrics[0]
    value = format(reference["target"], target.format) if math.isfinite(reference["target"]) else "none"
    origin = "" if has_own_target else f", the best score of {reference['method']!r} (mean over seeds)"
    edge = "; *: the best learning rate is at the edge of the grid" if any(row["is_at_edge"] for row in rows) else ""
    table = Table(
        title=f"Steps saved to {target.name} {value}{origin}",
        caption="steps saved: mean over seeds and 95 % bootstrap interval, by the evaluation weights that get there "
        "first; scores: mean ± standard deviation at the end, of the best evaluation weights; learning rates and "
        f"evaluation weights are chosen on the validation split; seconds: of training steps{edge}",
    )
    for heading in ("method", "rate", "evaluation weights"):
        table.add_column(heading, no_wrap=True)
    shown = metrics[:_NUM_METRICS]
    scores = [f"validation {metric.name}" for metric in shown]
    for heading in ("steps saved %", "reached", *scores, f"test {target.name}", "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['learning_rate']:g}{'*' if row['is_at_edge'] else ''}",
            row["weights"],
            _steps_saved(row),
            f"{row['reached']}/{row['runs']}",
            *(_mean_and_std(row, f"{row['weights']}: {metric.name}", metric) for metric in shown),
            _mean_and_std(row, f"test: {target.name}", target),
            f"{row['seconds']:.1f}",
        )
    console.print(table)


def print_tasks(table: Sequence[Row], rows: Mapping[str, Sequence[Row]], console: Console) -> None:
    """Print the table that `summarize_tasks` made of the rows of each task."""
    shown = Table(
        title="Steps saved %",
        caption="mean over seeds and 95 % bootstrap interval; mean: over these tasks, or over as many as have the "
        "method, seeds resampled within each; at most: some run did not reach the target, and saved nothing",
        show_lines=True,
        padding=0,
    )
    for index, heading in enumerate(("method", *rows, f"mean of {len(rows)}", "worst")):
        shown.add_column(_narrow(heading), justify="right" if index else "left", overflow="fold")
    cells = {(task, row["method"]): _steps_saved(row) for task, task_rows in rows.items() for row in task_rows}
    for row in table:
        method, count = row["method"], row["tasks"]
        mean = (f"of {count}: " if count < len(rows) else "") + _steps_saved(row)
        worst = f"{100 * row['worst']:.0f}, {row['worst_task']}"
        line = (method, *(cells.get((task, method), "") for task in rows), mean, worst)
        shown.add_row(*map(_narrow, line))
    console.print(shown)


def _narrow(cell: str) -> str:
    """Break a cell into lines of at most 12 characters, with the interval on one line."""
    value, bracket, interval = cell.partition("(")
    return "\n".join([*textwrap.wrap(value, _CELL_WIDTH), *([bracket + interval] if bracket else [])])


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
