"""Plots of comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wnn_jax.meta.evaluation.results import Result
from wnn_jax.meta.evaluation.summary import Row
from wnn_jax.meta.output import new_figure
from wnn_jax.meta.tasks.task import Metric


def plot_curves(
    results: Sequence[Result], rows: Sequence[Row], metric: Metric, path: Path, *, reading: str | None = None
) -> None:
    """Draws every arm at its own best learning rate: the best reading over steps, mean and range over seeds.

    Args:
      results: of all arms, each at one learning rate.
      rows: of the table.
      metric: what is drawn.
      path: of a PNG file.
      reading: what is read, or `None` for the best reading at every evaluation.
    """
    with new_figure(path, figsize=(9, 5.5)) as (figure, axis):
        best, worst = [], []
        for index, row in enumerate(rows):
            runs = [result for result in results if result.arm == row["arm"] and not result.diverged]
            if not runs:
                continue
            steps = [evaluation.step for evaluation in runs[0].evaluations]
            values = np.array([_curve(run, metric, reading) for run in runs])
            mean = values.mean(axis=0)
            style = "--" if index >= 10 else "-"
            label = f"{row['arm']}, {row['learning_rate']:g} (n={len(runs)})"
            axis.plot(steps, mean, style, color=f"C{index % 10}", label=label, linewidth=1.5)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=f"C{index % 10}", alpha=0.12, lw=0)
            ordered = np.sort(mean) if metric.higher_is_better else -np.sort(-mean)
            best.append(ordered[-1])
            # The first quarter of a training would squeeze what is to be compared.
            worst.append(ordered[len(ordered) // 6])
        target = rows[0]["target"]
        axis.axhline(target, color="0.4", linestyle=":", linewidth=1, label=f"target {format(target, metric.format)}")
        if best:
            shown = [*worst, *best, *([target] if np.isfinite(target) else [])]
            ends = min(shown), max(shown)
            margin = 0.05 * (ends[1] - ends[0]) or 0.01
            axis.set_ylim(ends[0] - margin, ends[1] + margin)
        axis.set(xlabel="steps", ylabel=f"validation {metric.name} ({reading or 'of the best reading at each step'})")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def plot_learning_rates(results: Sequence[Result], metric: Metric, path: Path, *, reading: str | None = None) -> None:
    """Draws the final score of every arm against the learning rate, every run as a dot and the mean as a line.

    Args:
      results: of all arms at all rates.
      metric: what is drawn.
      path: of a PNG file.
      reading: what is read, or `None` for the best reading of each run.
    """
    with new_figure(path, figsize=(9, 5.5)) as (figure, axis):
        for index, arm in enumerate(dict.fromkeys(result.arm for result in results)):
            by_rate: dict[float, list[float]] = {}
            for result in results:
                if result.arm == arm and not result.diverged:
                    by_rate.setdefault(result.learning_rate, []).append(_curve(result, metric, reading)[-1])
            rates = sorted(by_rate)
            style = "--" if index >= 10 else "-"
            color = f"C{index % 10}"
            axis.plot(rates, [np.mean(by_rate[rate]) for rate in rates], style, color=color, label=arm)
            for rate in rates:
                axis.plot([rate] * len(by_rate[rate]), by_rate[rate], "o", color=color, markersize=4, alpha=0.6)
        rates = sorted({result.learning_rate for result in results})
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set(xlabel="learning rate", ylabel=f"final validation {metric.name} ({reading or 'best reading'})")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)


def plot_tasks(table: Sequence[Row], rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draws the steps that every arm saves: a panel for each task, and one for their mean, with intervals.

    A hollow dot is an upper bound: some run did not reach the target. A mean over fewer tasks than all says how many.

    Args:
      table: over all tasks.
      rows: of each task, by its name.
      path: of a PNG file.
    """
    panels = {**rows, f"mean of {len(rows)} tasks": table}
    arms = [row["arm"] for row in table]
    num_columns = min(len(panels), 4)
    num_lines = -(-len(panels) // num_columns)
    size = (2 + 2.6 * num_columns, (0.9 + 0.24 * len(arms)) * num_lines)
    with new_figure(path, num_lines, num_columns, figsize=size, sharex=True, sharey=True, squeeze=False) as (
        figure,
        axes,
    ):
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
            is_mean = panel is table
            for row in panel:
                y, saved = arms.index(row["arm"]), 100 * row["steps_saved"]
                color = "black" if is_mean else f"C{list(panels).index(name) % 10}"
                if np.isfinite(row["steps_saved_low"]):
                    ends = [100 * row["steps_saved_low"], 100 * row["steps_saved_high"]]
                    axis.plot(ends, [y, y], color=color, linewidth=1.5)
                if row.get("tasks", len(rows)) < len(rows):
                    axis.annotate(f"of {row['tasks']}", (saved, y), (0, 4), textcoords="offset points", fontsize=7)
                face = color if row["reached"] == row["runs"] else "white"
                axis.plot(saved, y, "D" if is_mean else "o", color=color, markerfacecolor=face, markersize=5)
            axis.set_title(name, fontsize=9, fontweight="bold" if is_mean else None)
            axis.set_yticks(range(len(arms)), arms, fontsize=8)
            axis.grid(alpha=0.3)
        axes.flat[0].set_ylim(len(arms) - 0.5, -0.5)
        axes.flat[0].set_xlim(left=-5)
        figure.supxlabel("steps saved % (hollow: at most, some run did not reach the target)", fontsize=9)


def _curve(run: Result, metric: Metric, reading: str | None) -> list[float]:
    """A score over a run; of the best reading at every evaluation, where none is named."""
    curve = []
    for evaluation in run.evaluations:
        values = {name: scores[metric.name] for name, scores in evaluation.scores.items()}
        # A reading of a further stage is not there before it.
        curve.append(values.get(reading or metric.best(values), np.nan))
    return curve
