"""The plan of a comparison: its runs, their results, and its table and plot."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from rich.console import Console

from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.comparing.options import Comparison, Execution, check_comparison
from wnn_jax.lab.comparing.plots import plot_comparison
from wnn_jax.lab.comparing.results import Result, load_results
from wnn_jax.lab.comparing.runs import Run, train_run
from wnn_jax.lab.comparing.summary import Row, best_rates, summarize
from wnn_jax.lab.comparing.tables import print_table
from wnn_jax.lab.errors import UsageError, look_up
from wnn_jax.lab.jobs import run_jobs
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks import Metric, Task, load_task
from wnn_jax.lab.tasks.task import check_outputs
from wnn_jax.lab.training.evaluation_weights import EMA_DECAYS, all_evaluation_weights
from wnn_jax.lab.training.keys import RESULTS_VERSION, describe_differences, run_key
from wnn_jax.lab.training.method import Method, check_method
from wnn_jax.lab.training.optimizers import ADAMW_WEIGHT_DECAY, BASE_OPTIMIZERS

Description = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison whose options can be used."""

    name: str
    comparison: Comparison
    execution: Execution
    methods: Mapping[str, Method | None]
    """By name; `None` for a method that only has recorded runs."""
    make_task: Callable[[], Task]
    task: Task | None
    """What to train, or `None` to show results only."""

    def train(self, console: Console, methods: Sequence[str] | None = None) -> None:
        """Make the results that are missing, by default of all methods."""
        names = [name for name, method in self.methods.items() if method and (methods is None or name in methods)]
        self._run_missing(self.search(names), console)
        if self.comparison.search_seeds is not None:
            self._run_missing(self._describe_final(names, self.load(self.search(names))[0]), console)

    def report(self, console: Console) -> list[Row]:
        """Print the table of the finished methods, draw their plot, and return the rows of the table.

        There are no rows while a baseline is unfinished.
        """
        comparison = self.comparison
        searched, stale = self._finished(self.search(tuple(self.methods)))
        results, _ = self._finished(self._describe_final(tuple(self.methods), searched))
        done = {result.method for result in results}
        baselines = [name for name, method in self.methods.items() if method and method.is_baseline]
        if not done or not done.issuperset(baselines):
            return []
        metrics = target_first(results[0].metrics, comparison.metric)
        rows = summarize(
            results,
            metrics,
            baselines=baselines,
            learning_rates={name: comparison.learning_rates_of(name) for name in self.methods},
            weights=comparison.evaluation_weights,
            target=comparison.target,
        )
        console.rule(self.name)
        print_table(rows, metrics, console, has_own_target=comparison.target is not None)
        if stale and self.task is None:
            console.print(f"note: {len(stale)} results are stale, for example: {stale[0]}", soft_wrap=True)
        if missing := [name for name in self.methods if name not in done]:
            console.print(f"missing: {', '.join(missing)}", soft_wrap=True, style="yellow")
        searched = [result for result in searched if result.method in done]
        path = self.execution.output / f"{self.name}.png"
        plot_comparison(results, searched, rows, metrics[0], path, weights=comparison.evaluation_weights)
        return rows

    def search(self, names: Sequence[str]) -> list[Description]:
        """Describe the runs that choose the learning rates of methods."""
        points = [(name, rate) for name in names for rate in self.comparison.learning_rates_of(name)]
        return self._describe(points, self.comparison.search_seeds or self.comparison.seeds)

    def _describe_final(self, names: Sequence[str], searched: Sequence[Result]) -> list[Description]:
        """Describe the runs of methods at their best learning rates."""
        if not searched:
            return []
        metric = target_first(searched[0].metrics, self.comparison.metric)[0]
        rates = best_rates(searched, metric, self.comparison.evaluation_weights)
        return self._describe([(name, rates[name]) for name in names if name in rates], self.comparison.seeds)

    def _describe(self, points: Sequence[tuple[str, float]], seeds: Sequence[int]) -> list[Description]:
        """Describe runs, seed by seed, so that a machine that slows down slows all methods alike."""
        settings = {} if self.task is None else self.task.describe()
        num_steps = self.comparison.num_steps
        return [
            {
                "task": {"name": self.comparison.task, **settings},
                "method": method.describe() if (method := self.methods[name]) else {"name": name},
                "learning_rate": rate,
                "seed": seed,
                "num_steps": num_steps,
                "evaluate_every": self.comparison.evaluate_every or max(num_steps // 40, 1),
            }
            for seed in seeds
            for name, rate in points
        ]

    def _finished(self, planned: Sequence[Description]) -> tuple[list[Result], list[str]]:
        """Return the results of the methods without a missing run, and a line for each stale result."""
        results, stale = self.load(planned)
        missing = collections.Counter(description["method"]["name"] for description in planned)
        missing -= collections.Counter(result.method for result in results)
        # Nobody can make the missing runs of a method that only has recorded ones.
        done = [result for result in results if not (missing[result.method] and self.methods[result.method])]
        return done, stale

    def load(self, planned: Sequence[Mapping[str, Any]]) -> tuple[list[Result], list[str]]:
        """Return the results of planned runs, and a line for each result that is stale.

        A stale result has another configuration or `RESULTS_VERSION`. It is left out of a comparison that trains.
        """
        by_place: dict[Any, list[Result]] = {}
        for result in load_results(self.execution.output):
            by_place.setdefault(_place(result.description), []).append(result)
        results, stale = [], []
        for description in planned:
            candidates = by_place.get(_place(description), [])
            differences = [self._differences(result, description) for result in candidates]
            fresh = [result for result, lines in zip(candidates, differences, strict=True) if not lines]
            results += (fresh or ([] if self.task else candidates))[-1:]
            if candidates and not fresh:
                method, rate, seed = (description[name] for name in ("method", "learning_rate", "seed"))
                stale.append(f"stale: {method['name']}, rate {rate:g}, seed {seed}: {'; '.join(differences[-1])}")
        return results, stale

    def _differences(self, result: Result, description: Mapping[str, Any]) -> list[str]:
        """List how a result differs from a planned run, as far as the plan knows its task and its method."""
        if result.version != RESULTS_VERSION:
            return [f"RESULTS_VERSION was {result.version} and is {RESULTS_VERSION}"]
        actual = dict(result.description)
        if self.task is None:
            actual["task"] = {"name": actual["task"]["name"]}
        if self.methods[result.method] is None:
            actual["method"] = {"name": result.method}
        return describe_differences(actual, description)

    def _run_missing(self, planned: Sequence[Description], console: Console) -> None:
        results, stale = self.load(planned)
        for line in stale:
            console.print(f"note: {line}", soft_wrap=True, style="yellow")
        keys = {run_key(result.description) for result in results}
        folder = self.execution.output.absolute()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        runs = [
            Run(self.make_task, method, description, folder, self.execution.checkpoint_seconds)
            for description in planned
            if run_key(description) not in keys and (method := self.methods[description["method"]["name"]])
        ]
        where, num_processes = self.execution.executor, self.execution.num_processes
        with Progress(f"{self.name}: runs", total=len(planned), completed=len(planned) - len(runs)) as progress:
            for run in run_jobs(train_run, runs, executor=where, num_processes=num_processes):
                rate, seed = run.description["learning_rate"], run.description["seed"]
                progress.advance(metrics=f"{run.method.name} {rate:g} {seed}")
        with contextlib.suppress(OSError):  # Other runs have checkpoints there.
            (folder / "checkpoints").rmdir()


def make_plan(name: str, comparison: Comparison, execution: Execution, *, loads_task: bool) -> Plan:
    """Make the plan of a comparison. An option that cannot be used is a `UsageError`."""
    check_comparison(comparison)
    trainable = [name for name in comparison.methods if name not in comparison.recorded]
    chosen = find_methods(
        trainable,
        comparison.base or look_up(BASE_OPTIMIZERS, comparison.optimizer, "--optimizer"),
        weight_decay=ADAMW_WEIGHT_DECAY if not comparison.base and comparison.optimizer == "adamw" else 0.0,
        own=comparison.own_methods,
        snapshot_every=comparison.snapshot_every,
    )
    by_name = dict(zip(trainable, chosen, strict=True))
    # The name of a nowcaster's file in tables is its stem.
    methods = {by_name[name].name if name in by_name else name: by_name.get(name) for name in comparison.methods}
    weights = comparison.evaluation_weights
    for method in chosen:  # Before data is loaded: some need a longer run.
        names = all_evaluation_weights(method.evaluation_weights, EMA_DECAYS)
        # The evaluation weights of a later stage are only known when it begins.
        if weights is not None and weights not in names and not method.stages:
            raise UsageError(
                f"--evaluation-weights {weights!r}: the method {method.name!r} has only {', '.join(names)}."
            )
        with _errors_of(method.name, comparison):
            method.optimizer(comparison.learning_rates_of(method.name)[0], comparison.num_steps)
    # Absolute, because the workers of a cluster have other working directories.
    factory = comparison.make_task or functools.partial(load_task, comparison.task)
    make_task = functools.partial(factory, execution.data_dir.absolute())
    task = make_task() if loads_task else None
    if task is not None:
        check_outputs(task)
        target_first(task.metrics, comparison.metric)
        for method in chosen:
            with _errors_of(method.name, comparison):
                check_method(method, task, comparison.learning_rates_of(method.name)[0], comparison.num_steps)
    return Plan(name, comparison, execution, methods, make_task, task)


@contextlib.contextmanager
def _errors_of(method: str, comparison: Comparison) -> Generator[None]:
    """Say in one line which method does not fit the task or the length of a run."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"--methods {method!r} does not fit --task {comparison.task!r} or --num-steps {comparison.num_steps}, "
            f"change one of them: {' '.join(str(error).split())}"
        ) from error


def target_first(metrics: Sequence[Metric], name: str | None) -> tuple[Metric, ...]:
    """Return the metrics, with the target first. An unknown name is a `UsageError`."""
    if name is None:
        return tuple(metrics)
    target = look_up({metric.name: metric for metric in metrics}, name, "--metric")
    return target, *(metric for metric in metrics if metric.name != name)


def _place(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the columns that identify a run in a table."""
    names = ("learning_rate", "seed", "num_steps", "evaluate_every")
    return description["task"]["name"], description["method"]["name"], *(description[name] for name in names)
