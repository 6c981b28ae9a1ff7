"""Plots of comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.comparing.summary import Row
from wnn_jax.lab.output import add_legend, new_figure
from wnn_jax.lab.tasks.task import Metric


def plot_curves(
    results: Sequence[Result], rows: Sequence[Row], metric: Metric, path: Path, *, reading: str | None = None
) -> None:
    """Draws every method at its own best learning rate: the best reading over steps, mean and range over seeds.

    Args:
      results: of all methods, each at one learning rate.
      rows: of the table.
      metric: what is drawn.
      path: of a PNG file.
      reading: what is read, or `None` for the best reading at every evaluation.
    """
    methods = [[run for run in results if run.method == row["method"] and not run.diverged] for row in rows]
    curves = [np.array([_curve(run, metric, reading) for run in runs]) for runs in methods]
    means = [values.mean(axis=0) if len(values) else np.array([]) for values in curves]
    target = rows[0]["target"]
    # The beginning of a training would squeeze what is to be compared.
    limits = _limits([target, *(value for mean in means for value in mean[len(mean) // 6 :])], metric)
    with new_figure(path, figsize=(9, 5.5)) as (figure, axis):
        for index, (row, runs, values, mean) in enumerate(zip(rows, methods, curves, means, strict=True)):
            steps = [evaluation.step for evaluation in runs[0].evaluations] if runs else []
            label = f"{row['method']}, {row['learning_rate']:g} (n={len(runs)}{_why_unseen(mean, limits)})"
            style = _style(index)
            axis.plot(steps, mean, label=label, **style)
            if runs:
                ends = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, *ends, color=style["color"], alpha=0.12, lw=0)
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {format(target, metric.format)}")
        axis.set_ylim(*limits)
        axis.set(xlabel="steps", ylabel=f"validation {metric.name} ({reading or 'of the best reading at each step'})")
        axis.grid(alpha=0.3)
        add_legend(figure, fontsize=8)


def plot_learning_rates(results: Sequence[Result], metric: Metric, path: Path, *, reading: str | None = None) -> None:
    """Draws the final score of every method against the learning rate, every run as a dot and the mean as a line.

    Where all runs of a rate diverged the line is broken.

    Args:
      results: of all methods at all rates.
      metric: what is drawn.
      path: of a PNG file.
      reading: what is read, or `None` for the best reading of each run.
    """
    methods: dict[str, dict[float, list[float]]] = {result.method: {} for result in results}
    for result in results:
        finished = methods[result.method].setdefault(result.learning_rate, [])
        if not result.diverged:
            finished.append(_curve(result, metric, reading)[-1])
    means = {
        method: {rate: float(np.mean(scores[rate])) if scores[rate] else np.nan for rate in sorted(scores)}
        for method, scores in methods.items()
    }
    limits = _limits([score for scores in methods.values() for group in scores.values() for score in group], metric)
    with new_figure(path, figsize=(9, 5.5)) as (figure, axis):
        for index, (method, mean) in enumerate(means.items()):
            style = _style(index)
            why_unseen = _why_unseen([value for value in mean.values() if np.isfinite(value)], limits)
            axis.plot(list(mean), list(mean.values()), label=f"{method}{why_unseen}", **style)
            for rate, scores in methods[method].items():
                axis.plot([rate] * len(scores), scores, "o", color=style["color"], markersize=4, alpha=0.6)
        rates = sorted({result.learning_rate for result in results})
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set_ylim(*limits)
        axis.set(xlabel="learning rate", ylabel=f"final validation {metric.name} ({reading or 'best reading'})")
        axis.grid(alpha=0.3)
        add_legend(figure, fontsize=8)


def plot_tasks(table: Sequence[Row], rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws the steps that every method saves: a panel for each task, and one for their mean, with intervals.

    A hollow dot is an upper bound: some run did not reach the target. A mean over fewer tasks than all says how many.

    Args:
      table: over all tasks.
      rows: of each task, by its name.
      path: of a PNG file.
    """
    panels = {**rows, f"mean of {len(rows)} tasks": table}
    methods = [row["method"] for row in table]
    num_columns = min(len(panels), 4)
    num_lines = -(-len(panels) // num_columns)
    size = (2 + 2.6 * num_columns, (0.9 + 0.24 * len(methods)) * num_lines)
    with new_figure(path, num_lines, num_columns, figsize=size, sharex=True, sharey=True, squeeze=False) as (
        figure,
        axes,
    ):
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
            is_mean = panel is table
            for row in panel:
                y, saved = methods.index(row["method"]), 100 * row["steps_saved"]
                color = "black" if is_mean else f"C{list(panels).index(name) % 10}"
                if np.isfinite(row["steps_saved_low"]):
                    ends = [100 * row["steps_saved_low"], 100 * row["steps_saved_high"]]
                    axis.plot(ends, [y, y], color=color, linewidth=1.5)
                if row.get("tasks", len(rows)) < len(rows):
                    axis.annotate(f"of {row['tasks']}", (saved, y), (0, 4), textcoords="offset points", fontsize=7)
                face = color if row["reached"] == row["runs"] else "white"
                axis.plot(saved, y, "D" if is_mean else "o", color=color, markerfacecolor=face, markersize=5)
            axis.set_title(name, fontsize=9, fontweight="bold" if is_mean else None)
            axis.set_yticks(range(len(methods)), methods, fontsize=8)
            axis.tick_params(labelbottom=True, labelsize=8)
            axis.grid(alpha=0.3)
        axes.flat[0].set_ylim(len(methods) - 0.5, -0.5)
        axes.flat[0].set_xlim(left=-5)
        figure.supxlabel("steps saved % (hollow: at most, some run did not reach the target)", fontsize=9)


def _style(index: int) -> dict[str, Any]:
    """How a method is drawn: narrow over wide, so that neighbours in the table that go the same way are both seen."""
    level = index % 3
    return {
        "color": f"C{index % 10}",
        "linestyle": "--" if index >= 10 else "-",
        "linewidth": (3.5, 2.2, 1.2)[level],
        "zorder": 2 + level / 10,
    }


def _limits(values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """The ends of an axis that shows all values but those far worse than most, by ten interquartile ranges."""
    finite = np.array([value for value in values if np.isfinite(value)] or [0.0, 1.0])
    low, first, third, high = np.quantile(finite, [0, 0.25, 0.75, 1])
    if metric.higher_is_better:
        low = max(low, first - 10 * (third - first))
    else:
        high = min(high, third + 10 * (third - first))
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def _why_unseen(values: Sequence[float] | np.ndarray, limits: tuple[float, float]) -> str:
    """What the legend says of a method of which nothing is within the limits of the axis."""
    if any(limits[0] <= value <= limits[1] for value in values):
        return ""
    return ", off the axis" if len(values) else ", diverged"


def _curve(run: Result, metric: Metric, reading: str | None) -> list[float]:
    """A score over a run; of the best reading at every evaluation, where none is named."""
    curve = []
    for evaluation in run.evaluations:
        values = {name: scores[metric.name] for name, scores in evaluation.scores.items()}
        # A reading of a further stage is not there before it.
        curve.append(values.get(reading or metric.best(values), np.nan))
    return curve
