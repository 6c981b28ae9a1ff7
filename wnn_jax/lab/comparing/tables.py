"""The table of a comparison on a terminal."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from wnn_jax.lab.comparing.summary import Row
from wnn_jax.lab.tasks.task import Metric

# More metrics than these make a table that is too wide; the CSV has all.
_NUM_SHOWN = 2

_CELL_WIDTH = 12


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
    origin = "" if has_own_target else f", the best score of {reference['method']!r} (mean over seeds)"
    edge = "; *: the best rate is at the edge of the grid" if any(row["is_at_edge"] for row in rows) else ""
    table = Table(
        title=f"Steps saved to {target.name} {value}{origin}",
        caption="steps saved: mean over seeds and 95 % bootstrap interval, by whichever reading is there first; "
        "scores: mean ± standard deviation at the end, of the reading that is best there; rates and readings are "
        f"chosen on the validation split; seconds: of training steps{edge}",
    )
    for heading in ("method", "rate", "read from"):
        table.add_column(heading, no_wrap=True)
    shown = metrics[:_NUM_SHOWN]
    scores = [f"validation {metric.name}" for metric in shown]
    for heading in ("steps saved %", "reached", *scores, f"test {target.name}", "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        best = row["reading"]
        table.add_row(
            row["method"],
            f"{row['learning_rate']:g}{'*' if row['is_at_edge'] else ''}",
            best,
            _steps_saved(row),
            f"{row['reached']}/{row['runs']}",
            *(_mean_and_std(row, f"{best}: {metric.name}", metric) for metric in shown),
            _mean_and_std(row, f"test: {target.name}", target),
            f"{row['seconds']:.1f}",
        )
    console.print(table)


def print_tasks(table: Sequence[Row], rows: Mapping[str, Sequence[Row]], console: Console) -> None:
    """Shows the table over several tasks on a terminal.

    Args:
      table: of `summarize_tasks`.
      rows: of each task, by its name.
      console: where to.
    """
    headings, *lines = ([_narrow(cell) for cell in line] for line in _cells(table, rows))
    shown = Table(
        title="Steps saved %",
        caption="mean over seeds and 95 % bootstrap interval; mean: over these tasks, or so many as "
        "have the method, seeds resampled within each; at most: some run did not reach the target, and saved nothing",
        show_lines=True,
        padding=0,
    )
    for index, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if index else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)


def tasks_as_markdown(
    table: Sequence[Row], rows: Mapping[str, Sequence[Row]], missing: Mapping[str, Sequence[str]]
) -> str:
    """The table over several tasks, in Markdown, with what is missing below it.

    Args:
      table: of `summarize_tasks`.
      rows: of each task, by its name.
      missing: the methods without a result, by task.
    """
    headings, *lines = _cells(table, rows)
    written = [f"| {' | '.join(line)} |" for line in (headings, *lines)]
    written.insert(1, f"|{'---|' * len(headings)}")
    notes = [f"- missing: {task}: {', '.join(methods)}" for task, methods in missing.items() if methods]
    return "\n".join([*written, *(["", *notes] if notes else []), ""])


def _narrow(cell: str) -> str:
    """A cell in lines of at most 12 characters, where it has hyphens or spaces to break it at, the interval in one."""
    value, bracket, interval = cell.partition("(")
    return "\n".join([*textwrap.wrap(value, _CELL_WIDTH), *([bracket + interval] if bracket else [])])


def _cells(table: Sequence[Row], rows: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """The headings and the lines of the table over several tasks."""
    cells = {(task, row["method"]): _steps_saved(row) for task, task_rows in rows.items() for row in task_rows}
    lines = [["method", *rows, f"mean of {len(rows)}", "worst"]]
    for row in table:
        method, count = row["method"], row["tasks"]
        mean = (f"of {count}: " if count < len(rows) else "") + _steps_saved(row)
        worst = f"{100 * row['worst']:.0f}, {row['worst_task']}"
        lines.append([method, *(cells.get((task, method), "") for task in rows), mean, worst])
    return lines


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
