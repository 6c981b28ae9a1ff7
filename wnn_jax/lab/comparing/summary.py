"""What a comparison shows: best learning rates, steps saved, final scores."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Metric

Row = dict[str, Any]

_CONFIDENCE = 0.95


def best_rates(results: Sequence[Result], metric: Metric, reading: str | None = None) -> dict[str, float]:
    """Method -> the learning rate with the best mean final value of a metric on the validation split.

    Args:
      results: of all methods at all rates.
      metric: what decides.
      reading: what to read, or `None` for the best reading.

    Raises:
      UsageError: if there is no such reading.
    """
    rates: dict[str, float] = {}
    for method, runs in _grouped(results).items():
        by_rate: dict[float, list[Result]] = {}
        for run in runs:
            by_rate.setdefault(run.learning_rate, []).append(run)
        scores = {str(rate): _best_final(group, metric, reading)[1] for rate, group in by_rate.items()}
        rates[method] = float(metric.best(scores))
    return rates


def summarize(
    results: Sequence[Result],
    metrics: Sequence[Metric],
    *,
    plain: Sequence[str],
    learning_rates: Mapping[str, Sequence[float]],
    reading: str | None = None,
    target: float | None = None,
) -> list[Row]:
    """The table of a comparison: one row per method.

    The reference is the plain method with the best final score, or the first method where none is plain. A run has saved the
    share of its steps that it did not need to reach the target: the best score that the reference, with the same seed,
    has had by its end. (Scores go to and fro from one evaluation to the next; a target that is the last score itself is
    soon reached by chance.) Whichever reading gets there first counts, in the reference too. Between two evaluations
    the score is taken to be a straight line. A run that does not reach the target has saved nothing, at most: the mean
    over seeds is then an upper bound, and `reached` tells.

    Args:
      results: of all methods, each at one learning rate.
      metrics: of the task, the target first.
      plain: the names of the methods that may be the reference.
      learning_rates: of every method, among which its own was chosen.
      reading: what to read in every method, or `None` for the best.
      target: a value to reach in place of the reference's.

    Raises:
      UsageError: if there is no such reading.
    """
    metric = metrics[0]
    by_method = _grouped(results)
    finals = {method: _best_final(runs, metric, reading) for method, runs in by_method.items()}
    candidates = {method: finals[method][1] for method in by_method if method in plain} or {next(iter(by_method)): 0.0}
    reference = metric.best(candidates)
    targets = {run.seed: _best_so_far(run, metric, reading) for run in by_method[reference]}
    if target is not None:
        targets = dict.fromkeys(targets, target)
    return [
        _row(method, runs, metrics, finals[method][0], targets, reading, reference, learning_rates[method])
        for method, runs in by_method.items()
    ]


def steps_to(run: Result, metric: Metric, target: float, reading: str | None = None) -> float:
    """The steps until a run's score is at the target, or infinity.

    Args:
      run: the run.
      metric: what counts.
      target: its value.
      reading: what to read, or `None` for whichever gets there first.
    """
    return min(_crossing(run, metric, target, name) for name in _readings(run, reading))


def _best_so_far(run: Result, metric: Metric, reading: str | None) -> float:
    """The best value of a metric in a whole run."""
    values = {
        f"{name} {evaluation.step}": evaluation.scores[name][metric.name]
        for evaluation in run.evaluations
        for name in _readings(run, reading)
        if name in evaluation.scores
    }
    return values[metric.best(values)]


def _readings(run: Result, reading: str | None) -> Sequence[str]:
    """What to read in a run. A further stage of it may have readings that the ones before have not."""
    if reading is not None:
        return (reading,)
    return tuple(dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.scores))


def _crossing(run: Result, metric: Metric, target: float, reading: str) -> float:
    previous_step, previous = 0, math.nan
    for evaluation in run.evaluations:
        if reading not in evaluation.scores:
            continue
        value = evaluation.scores[reading][metric.name]
        if metric.is_at_least(value, target):
            if not math.isfinite(previous) or value == previous:
                return float(evaluation.step)
            share = (target - previous) / (value - previous)
            return previous_step + share * (evaluation.step - previous_step)
        previous_step, previous = evaluation.step, value
    return math.inf


def _row(
    method: str,
    runs: Sequence[Result],
    metrics: Sequence[Metric],
    best: str,
    targets: Mapping[int, float],
    reading: str | None,
    reference: str,
    learning_rates: Sequence[float],
) -> Row:
    metric = metrics[0]
    steps = [steps_to(run, metric, targets[run.seed], reading) for run in runs]
    num_steps = runs[0].description["num_steps"]
    saved = [1 - step / num_steps if math.isfinite(step) else 0.0 for step in steps]
    low, high = _interval(saved)
    rate = runs[0].learning_rate
    row: Row = {
        "method": method,
        "is_reference": method == reference,
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
        "reading": best,
        "fingerprint": runs[0].description["method"].get("nowcaster"),
    }
    for name in _final_readings(runs):
        for each in metrics:
            values = [run.final(each.name).get(name, math.nan) for run in runs]
            row[f"{name}: {each.name}"], row[f"{name}: {each.name} std"] = _mean_and_std(values)
    for each in metrics:
        values = [math.nan if run.diverged else run.test[best][each.name] for run in runs]
        row[f"test: {each.name}"], row[f"test: {each.name} std"] = _mean_and_std(values)
    return row


def _best_final(runs: Sequence[Result], metric: Metric, reading: str | None) -> tuple[str, float]:
    """The reading with the best mean final value, and that value; NaN if a run diverged."""
    names = _final_readings(runs)
    if reading is not None:
        if reading not in names:
            raise UsageError(f"--reading {reading!r} is not one of the method {runs[0].method!r}: {', '.join(names)}.")
        names = (reading,)
    finals = [run.final(metric.name) for run in runs]
    means = {name: statistics.mean(final.get(name, math.nan) for final in finals) for name in names}
    best = metric.best(means)
    return best, means[best]


def _final_readings(runs: Sequence[Result]) -> Sequence[str]:
    """What is read at the end of a method's runs. One that diverged in its first stage lacks the readings of the last."""
    return tuple(dict.fromkeys(name for run in runs for name in run.evaluations[-1].scores))


def summarize_tasks(rows: Mapping[str, Sequence[Row]], methods: Sequence[str]) -> list[Row]:
    """The table over several tasks: one row per method, with the mean over the tasks and the worst of them.

    The interval of the mean is a bootstrap over seeds within tasks: the seeds of every task are drawn anew, and the
    tasks stay. So it says how far the mean over these tasks would be another one with other seeds, and nothing of
    other tasks.

    Args:
      rows: of each task, by its name: those of the methods that are there.
      methods: all methods, in the order of the table.
    """
    table: list[Row] = []
    for method in methods:
        of_task = {task: row for task, task_rows in rows.items() for row in task_rows if row["method"] == method}
        if not of_task:
            continue
        low, high = _interval(*(row["steps_saved_by_seed"] for row in of_task.values()))
        worst = min(of_task, key=lambda task: of_task[task]["steps_saved"])
        table.append(
            {
                "method": method,
                "tasks": len(of_task),
                "reached": sum(row["reached"] for row in of_task.values()),
                "runs": sum(row["runs"] for row in of_task.values()),
                "steps_saved": statistics.mean(row["steps_saved"] for row in of_task.values()),
                "steps_saved_low": low,
                "steps_saved_high": high,
                "worst": of_task[worst]["steps_saved"],
                "worst_task": worst,
            }
        )
    return table


def _interval(*samples: Sequence[float]) -> tuple[float, float]:
    """A bootstrap interval of the mean over samples of the means over seeds; NaN where a sample is of a single one."""
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


def _grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each method, in the order of their first appearance."""
    by_method: dict[str, list[Result]] = {}
    for result in results:
        by_method.setdefault(result.method, []).append(result)
    return by_method
