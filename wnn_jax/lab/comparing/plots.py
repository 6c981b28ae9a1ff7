"""Plots of comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.comparing.summary import Row
from wnn_jax.lab.output import add_legend, new_figure
from wnn_jax.lab.tasks.task import Metric


def plot_comparison(
    results: Sequence[Result],
    searched: Sequence[Result],
    rows: Sequence[Row],
    metric: Metric,
    path: Path,
    *,
    weights: str | None = None,
) -> None:
    """Draw scores over steps, and final scores against the learning rate where several were tried.

    The left plot has the results of every method at its own best learning rate: the mean over seeds, with the range as
    a band. The right plot has every run of the search as a dot, and the mean as a line.
    """
    num_panels = 2 if len({result.learning_rate for result in searched}) > 1 else 1
    with new_figure(path, 1, num_panels, figsize=(8 * num_panels, 5.5), squeeze=False) as (figure, axes):
        _draw_curves(axes[0, 0], results, rows, metric, weights)
        if num_panels == 2:
            _draw_learning_rates(axes[0, 1], searched, [row["method"] for row in rows], metric, weights)
        add_legend(figure, *axes[0, 0].get_legend_handles_labels(), fontsize=8)


def _draw_curves(
    axis: Any, results: Sequence[Result], rows: Sequence[Row], metric: Metric, weights: str | None
) -> None:
    target = rows[0]["target"]
    methods = [[run for run in results if run.method == row["method"] and not run.diverged] for row in rows]
    curves = [np.array([_curve(run, metric, weights) for run in runs]) for runs in methods]
    means = [values.mean(axis=0) if len(values) else np.array([]) for values in curves]
    # The beginning of the runs would squeeze the rest.
    limits = _limits([target, *(value for mean in means for value in mean[len(mean) // 6 :])], metric)
    for index, (row, runs, values, mean) in enumerate(zip(rows, methods, curves, means, strict=True)):
        steps = [evaluation.step for evaluation in runs[0].evaluations] if runs else []
        note = "" if any(limits[0] <= value <= limits[1] for value in mean) else ", off the axis"
        label = f"{row['method']}, {row['learning_rate']:g} (n={len(runs)}{note if runs else ', diverged'})"
        axis.plot(steps, mean, label=label, **_style(index))
        if runs:
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=f"C{index % 10}", alpha=0.12, lw=0)
    axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {format(target, metric.format)}")
    axis.set_ylim(*limits)
    axis.set(xlabel="steps", ylabel=f"validation {metric.name} ({weights or 'best evaluation weights at each step'})")
    axis.grid(alpha=0.3)


def _draw_learning_rates(
    axis: Any, searched: Sequence[Result], methods: Sequence[str], metric: Metric, weights: str | None
) -> None:
    finals: dict[str, dict[float, list[float]]] = {method: {} for method in methods}
    for run in sorted(searched, key=lambda run: run.learning_rate):
        scores = finals[run.method].setdefault(run.learning_rate, [])
        scores += [] if run.diverged else [_curve(run, metric, weights)[-1]]
    for index, by_rate in enumerate(finals.values()):
        # The line is broken where all runs of a learning rate diverged.
        means = [float(np.mean(scores)) if scores else np.nan for scores in by_rate.values()]
        axis.plot(list(by_rate), means, **_style(index))
        for rate, scores in by_rate.items():
            axis.plot([rate] * len(scores), scores, "o", color=f"C{index % 10}", markersize=4, alpha=0.6)
    rates = sorted({result.learning_rate for result in searched})
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    values = [score for by_rate in finals.values() for scores in by_rate.values() for score in scores]
    axis.set_ylim(*_limits(values, metric))
    axis.set(xlabel="learning rate", ylabel=f"final validation {metric.name} ({weights or 'best evaluation weights'})")
    axis.grid(alpha=0.3)


def plot_tasks(table: Sequence[Row], rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the steps that every method saves: a panel for each task and one for their mean, with intervals.

    A hollow dot is an upper bound: some run did not reach the target. A mean over fewer tasks than all says how many.
    """
    panels = {**rows, f"mean of {len(rows)} tasks": table}
    methods = [row["method"] for row in table]
    num_columns = min(len(panels), 4)
    num_lines = -(-len(panels) // num_columns)
    size = (2 + 2.6 * num_columns, (0.9 + 0.24 * len(methods)) * num_lines)
    options: Any = {"figsize": size, "sharex": True, "sharey": True, "squeeze": False}
    with new_figure(path, num_lines, num_columns, **options) as (figure, axes):
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for index, (axis, (name, panel)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
            is_mean = panel is table
            color = "black" if is_mean else f"C{index % 10}"
            for row in panel:
                y, saved = methods.index(row["method"]), 100 * row["steps_saved"]
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
    """Return how to draw a method: narrow over wide, so that you see both where neighbours in the table coincide."""
    level = index % 3
    return {
        "color": f"C{index % 10}",
        "linestyle": "--" if index >= 10 else "-",
        "linewidth": (3.5, 2.2, 1.2)[level],
        "zorder": 2 + level / 10,
    }


def _limits(values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """Return the ends of an axis that shows all values, except values ten interquartile ranges worse than most."""
    finite = np.array([value for value in values if np.isfinite(value)] or [0.0, 1.0])
    low, first, third, high = np.quantile(finite, [0, 0.25, 0.75, 1])
    if metric.higher_is_better:
        low = max(low, first - 10 * (third - first))
    else:
        high = min(high, third + 10 * (third - first))
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def _curve(run: Result, metric: Metric, weights: str | None) -> list[float]:
    """Return a score over a run, of the best evaluation weights at every evaluation where none are named."""
    curve = []
    for evaluation in run.evaluations:
        values = {name: scores[metric.name] for name, scores in evaluation.scores.items()}
        # The evaluation weights of a later stage do not exist before it.
        curve.append(values.get(weights or metric.best(values), np.nan))
    return curve
