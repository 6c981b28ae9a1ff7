"""The figures of a comparison: best learning rates, steps saved, final scores."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.trainer import Evaluation

Row = dict[str, Any]

_CONFIDENCE = 0.95


def best_rates(results: Sequence[Result], metric: Metric, weights: str | None = None) -> dict[str, float]:
    """Map each method to the learning rate with the best mean final metric, at these evaluation weights or the best."""
    rates: dict[str, float] = {}
    for method, runs in by_method(results).items():
        by_rate: dict[float, list[Result]] = {}
        for run in runs:
            by_rate.setdefault(run.learning_rate, []).append(run)
        scores = {str(rate): _best_final(group, metric, weights)[1] for rate, group in by_rate.items()}
        rates[method] = float(metric.best(scores))
    return rates


def summarize(
    results: Sequence[Result],
    metrics: Sequence[Metric],
    *,
    baselines: Sequence[str],
    learning_rates: Mapping[str, Sequence[float]],
    weights: str | None = None,
    target: float | None = None,
) -> list[Row]:
    """Make the table of a comparison: one row per method.

    The reference is the baseline with the best final score, or the first method without a baseline. Its target, for
    each seed, is its best score in the whole run: a run often reaches its last score earlier by chance. A run saves the
    share of its steps that it does not need to reach the target. The evaluation weights that get there first count, in
    the reference too. Between two evaluations the score is a straight line. A run that does not reach the target saves
    nothing: the mean over seeds is then an upper bound, and `reached` tells.

    Each method has results at one learning rate of its grid in `learning_rates`. The first metric is the target. A
    method without the evaluation `weights` is a `UsageError`; by default the best ones count. `target` is a value to
    reach instead of the reference's.
    """
    metric = metrics[0]
    grouped = by_method(results)
    finals = {method: _best_final(runs, metric, weights) for method, runs in grouped.items()}
    candidates = {name: finals[name][1] for name in grouped if name in baselines} or {next(iter(grouped)): 0.0}
    reference = metric.best(candidates)
    best_scores = {run.seed: _best_so_far(run, metric, weights) for run in grouped[reference]}
    targets = best_scores if target is None else dict.fromkeys(best_scores, target)
    return [
        _row(runs, metrics, finals[method][0], targets, weights, method == reference, learning_rates[method])
        for method, runs in grouped.items()
    ]


def steps_to(run: Result, metric: Metric, target: float, weights: str | None = None) -> float:
    """Return the steps until a run reaches a target, or infinity, by these evaluation weights or the fastest."""
    names = [weights] if weights is not None else _names(run.evaluations)
    return min(_crossing(run, metric, target, name) for name in names)


def _best_so_far(run: Result, metric: Metric, weights: str | None) -> float:
    """Return the best value of a metric in a whole run."""
    values = {
        f"{name} {evaluation.step}": scores[metric.name]
        for evaluation in run.evaluations
        for name, scores in evaluation.scores.items()
        if weights in (None, name)
    }
    return values[metric.best(values)]


def _names(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return all evaluation weights. A later stage of a run may have some that the first stage lacks."""
    return list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores))


def _crossing(run: Result, metric: Metric, target: float, weights: str) -> float:
    previous_step, previous = 0, math.nan
    for evaluation in run.evaluations:
        if weights not in evaluation.scores:
            continue
        value = evaluation.scores[weights][metric.name]
        if metric.is_at_least(value, target):
            if not math.isfinite(previous) or value == previous:
                return float(evaluation.step)
            share = (target - previous) / (value - previous)
            return previous_step + share * (evaluation.step - previous_step)
        previous_step, previous = evaluation.step, value
    return math.inf


def _row(
    runs: Sequence[Result],
    metrics: Sequence[Metric],
    best: str,
    targets: Mapping[int, float],
    weights: str | None,
    is_reference: bool,
    learning_rates: Sequence[float],
) -> Row:
    steps = [steps_to(run, metrics[0], targets[run.seed], weights) for run in runs]
    num_steps = runs[0].description["num_steps"]
    saved = [1 - step / num_steps if math.isfinite(step) else 0.0 for step in steps]
    low, high = _interval(saved)
    rate = runs[0].learning_rate
    row: Row = {
        "method": runs[0].method,
        "is_reference": is_reference,
        "learning_rate": rate,
        "is_at_edge": len(learning_rates) > 1 and rate in (min(learning_rates), max(learning_rates)),
        "runs": len(runs),
        "diverged": sum(run.diverged for run in runs),
        "reached": sum(map(math.isfinite, steps)),
        "steps_saved": statistics.mean(saved),
        "steps_saved_low": low,
        "steps_saved_high": high,
        "steps_saved_by_seed": tuple(saved),
        "steps_to_target": statistics.median(steps),
        "target": statistics.mean(targets.values()),
        "seconds": statistics.median(run.evaluations[-1].seconds for run in runs),
        "weights": best,
        "fingerprint": runs[0].description["method"].get("nowcaster"),
    }
    for name in _names(run.evaluations[-1] for run in runs):
        for metric in metrics:
            values = [run.final(metric.name).get(name, math.nan) for run in runs]
            row[f"{name}: {metric.name}"], row[f"{name}: {metric.name} std"] = _mean_and_std(values)
    for metric in metrics:
        values = [math.nan if run.diverged else run.test[best][metric.name] for run in runs]
        row[f"test: {metric.name}"], row[f"test: {metric.name} std"] = _mean_and_std(values)
    return row


def _best_final(runs: Sequence[Result], metric: Metric, weights: str | None) -> tuple[str, float]:
    """Return the evaluation weights with the best mean final value, and that value; NaN if a run diverged."""
    names = _names(run.evaluations[-1] for run in runs)
    if weights is not None:
        if weights not in names:
            raise UsageError(
                f"--evaluation-weights {weights!r}: the method {runs[0].method!r} has only {', '.join(names)}."
            )
        names = [weights]
    finals = [run.final(metric.name) for run in runs]
    means = {name: statistics.mean(final.get(name, math.nan) for final in finals) for name in names}
    best = metric.best(means)
    return best, means[best]


def summarize_tasks(rows: Mapping[str, Sequence[Row]], methods: Sequence[str]) -> list[Row]:
    """Make the table over several tasks: one row per method, with the mean over the tasks and the worst task.

    `methods` is the order of the table. The interval is a bootstrap over seeds within tasks. It tells how much the mean
    over these tasks depends on the seeds. It tells nothing about other tasks.
    """
    table: list[Row] = []
    for method in methods:
        results = [(row, task) for task, task_rows in rows.items() for row in task_rows if row["method"] == method]
        if not results:
            continue
        low, high = _interval(*(row["steps_saved_by_seed"] for row, _ in results))
        worst, worst_task = min(results, key=lambda result: result[0]["steps_saved"])
        table.append(
            {
                "method": method,
                "tasks": len(results),
                "reached": sum(row["reached"] for row, _ in results),
                "runs": sum(row["runs"] for row, _ in results),
                "steps_saved": statistics.mean(row["steps_saved"] for row, _ in results),
                "steps_saved_low": low,
                "steps_saved_high": high,
                "worst": worst["steps_saved"],
                "worst_task": worst_task,
            }
        )
    return table


def _interval(*samples: Sequence[float]) -> tuple[float, float]:
    """Return a bootstrap interval of the mean of the samples' means; NaN where a sample has one value."""
    if min(map(len, samples)) < 2:
        return math.nan, math.nan
    from scipy.stats import bootstrap

    def mean_of_means(*resampled: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([np.mean(sample, axis=axis) for sample in resampled], axis=0)

    interval = bootstrap(
        samples, mean_of_means, method="percentile", confidence_level=_CONFIDENCE, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Group runs by method, in the order of their first appearance."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    return grouped
