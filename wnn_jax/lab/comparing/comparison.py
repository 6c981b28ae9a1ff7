"""Comparisons: every method with every seed, at its own best learning rate, on one task or several."""

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.comparing.options import Comparison, Execution, check_comparison, check_execution
from wnn_jax.lab.comparing.plots import plot_comparison, plot_tasks
from wnn_jax.lab.comparing.results import Result, load_results, stale_differences, write_results
from wnn_jax.lab.comparing.runs import Run, train_run
from wnn_jax.lab.comparing.summary import Row, best_rates, summarize, summarize_tasks
from wnn_jax.lab.comparing.tables import print_table, print_tasks
from wnn_jax.lab.errors import UsageError, look_up, one_line_errors
from wnn_jax.lab.jobs import run_jobs
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks import Metric, Task, load_task, load_tasks
from wnn_jax.lab.tasks.task import check_outputs
from wnn_jax.lab.training.evaluation_weights import EMA_DECAYS, all_evaluation_weights
from wnn_jax.lab.training.keys import run_key
from wnn_jax.lab.training.method import Method, check_method
from wnn_jax.lab.training.optimizers import ADAMW_WEIGHT_DECAY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Comparison, Execution):
    """Compare methods of training: how many steps each one saves, at its own best learning rate.

    Run the same command again to go on: finished runs are kept, interrupted runs continue from their last checkpoint.
    A result is only shown for the configuration that made it. Several processes can work on one folder.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunExperiment(Execution):
    """Run the comparisons of an experiment. Run the same command again to go on."""

    comparisons: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")] = None
    """Comparisons to train. Default: all. Tables and plots show all that is there."""
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD [METHOD ...]")] = None
    """Methods to train. Default: all."""


def compare(options: Compare) -> list[Row]:
    """Run a comparison, and write its table as text and CSV, and its plot.

    Args:
      options: what to compare, and how.

    Returns:
      The rows of the table, one per method.

    Raises:
      UsageError: if an option cannot be used.
    """
    return run_comparisons({"comparison": options}, options)["comparison"]


def run_comparisons(
    comparisons: Mapping[str, Comparison],
    execution: Execution,
    *,
    names: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    benchmark: Sequence[str] = (),
) -> dict[str, list[Row]]:
    """Run comparisons, and write their tables and plots.

    Args:
      comparisons: by name.
      execution: how to run, and where the results are.
      names: the comparisons to train. Default: all.
      methods: the methods to train. Default: all.
      benchmark: the comparisons of a table over several tasks.

    Returns:
      The rows of each table. None where no baseline is finished, because there is no reference yet.

    Raises:
      UsageError: if an option cannot be used, or data is missing; all missing data is listed.
    """
    check_execution(execution)
    chosen = tuple(comparisons) if names is None else names
    for name in chosen:
        look_up(comparisons, name, "--comparisons")
    known = dict.fromkeys(name for comparison in comparisons.values() for name in comparison.methods)
    for method in methods or ():
        look_up(known, method, "--methods")
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = chosen if execution.train else ()
    tasks = [comparisons[name].task for name in chosen if comparisons[name].make_task is None]
    load_tasks(tasks, execution.data_dir.absolute())
    plans = {
        name: make_plan(name, comparison, execution, loads_task=name in chosen)
        for name, comparison in comparisons.items()
    }
    for name in chosen:
        plans[name].train(console, methods)
    rows = {name: plan.report(console) for name, plan in plans.items()}
    save_rows(
        [{"comparison": name, **row} for name, of_name in rows.items() for row in of_name],
        execution.output / "summary.csv",
    )
    by_task = {comparisons[name].task: rows[name] for name in benchmark if rows[name]}
    if by_task:
        table = summarize_tasks(by_task, tuple(known))
        save_rows(table, execution.output / "benchmark.csv")
        plot_tasks(table, by_task, execution.output / "benchmark.png")
        print_tasks(table, by_task, console)
    console.print(f"Results, tables and plots: {execution.output}", soft_wrap=True)
    return rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison whose options can be used.

    Attributes:
      name: of the comparison.
      comparison: what to compare.
      execution: how to run.
      methods: by name; `None` for a method that only has recorded runs.
      make_task: makes the task, on any machine.
      task: what to train, or `None` if nothing is to be trained.
    """

    name: str
    comparison: Comparison
    execution: Execution
    methods: Mapping[str, Method | None]
    make_task: Callable[[], Task]
    task: Task | None

    def train(self, console: Console, methods: Sequence[str] | None = None) -> None:
        """Make the results that are missing.

        Args:
          console: where to name results of other configurations.
          methods: names of the methods to train. Default: all.
        """
        trainable = [name for name, method in self.methods.items() if method and (methods is None or name in methods)]
        if self.execution.output.is_dir() and not self.execution.resume:
            shutil.rmtree(self.execution.output / "checkpoints", ignore_errors=True)
            planned = {run_key(run) for run in [*self._search(trainable), *self._grid(trainable, self._seeds)]}
            kept = [
                result for result in load_results(self.execution.output) if run_key(result.description) not in planned
            ]
            write_results(self.execution.output, kept)
        self._run_missing(self._search(trainable), console)
        if self.comparison.search_seeds is not None:
            searched, _ = self._load(self._search(trainable))
            self._run_missing(self._final(trainable, searched), console)

    def report(self, console: Console) -> list[Row]:
        """Print the table of the finished methods and draw their plot.

        Returns:
          The rows of the table, one per method; none while a baseline is unfinished.
        """
        comparison = self.comparison
        searched, results, stale = self._finished()
        done = {result.method for result in results}
        baselines = [name for name, method in self.methods.items() if method and method.is_baseline]
        if not done or not done.issuperset(baselines):
            return []
        metrics = target_first(results[0].metrics, comparison.metric)
        rows = summarize(
            results,
            metrics,
            baselines=baselines,
            learning_rates={name: comparison.rates_of(name) for name in self.methods},
            weights=comparison.evaluation_weights,
            target=comparison.target,
        )
        console.rule(self.name)
        print_table(rows, metrics, console, has_own_target=comparison.target is not None)
        if stale and self.task is None:
            console.print(f"note: {len(stale)} results are stale, for example: {stale[0]}", soft_wrap=True)
        if missing := [name for name in self.methods if name not in done]:
            console.print(f"missing: {', '.join(missing)}", soft_wrap=True, style="yellow")
        path = self.execution.output / f"{self.name}.png"
        plot_comparison(results, searched, rows, metrics[0], path, weights=comparison.evaluation_weights)
        return rows

    def _finished(self) -> tuple[list[Result], list[Result], list[str]]:
        """Return the results of the finished methods, of the search and at the best rates, and the stale ones."""
        searched, stale = self._load(self._search(tuple(self.methods)))
        complete = self._complete(searched, self._search)
        searched = [result for result in searched if result.method in complete]
        if self.comparison.search_seeds is None:
            rates = self._best_rates(searched)
            return searched, [result for result in searched if result.learning_rate == rates[result.method]], stale
        results, more_stale = self._load(self._final(complete, searched))
        complete = self._complete(results, lambda names: self._final(names, searched))
        return (
            [result for result in searched if result.method in complete],
            [result for result in results if result.method in complete],
            [*stale, *more_stale],
        )

    def _complete(self, results: Sequence[Result], plan: Callable[[Sequence[str]], Sequence[Any]]) -> list[str]:
        """Return the methods without a missing run. Of a method that has recorded runs only, these are all."""
        counts = {name: sum(result.method == name for result in results) for name in self.methods}
        return [
            name for name, count in counts.items() if count and (not self.methods[name] or count == len(plan([name])))
        ]

    @property
    def _seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([*self.comparison.seeds, *(self.comparison.search_seeds or ())]))

    def _search(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the runs that choose the learning rates of methods."""
        return self._grid(names, self.comparison.search_seeds or self.comparison.seeds)

    def _grid(self, names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        return self._describe([(name, rate) for name in names for rate in self.comparison.rates_of(name)], seeds)

    def _final(self, names: Sequence[str], searched: Sequence[Result]) -> list[dict[str, Any]]:
        """Return the runs of methods at their best learning rates."""
        rates = self._best_rates(searched)
        return self._describe([(name, rates[name]) for name in names], self.comparison.seeds)

    def _best_rates(self, searched: Sequence[Result]) -> dict[str, float]:
        if not searched:
            return {}
        metric = target_first(searched[0].metrics, self.comparison.metric)[0]
        return best_rates(searched, metric, self.comparison.evaluation_weights)

    def _describe(self, points: Sequence[tuple[str, float]], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Describe all runs, seed by seed, so that a machine that slows down slows all methods alike."""
        settings = {} if self.task is None else self.task.describe()
        num_steps = self.comparison.num_steps
        return [
            {
                "task": {"name": self.comparison.task, **settings},
                "method": {"name": name} if (method := self.methods[name]) is None else method.describe(),
                "learning_rate": rate,
                "seed": seed,
                "num_steps": num_steps,
                "evaluate_every": self.comparison.evaluate_every or max(num_steps // 40, 1),
            }
            for seed in seeds
            for name, rate in points
        ]

    def _load(self, planned: Sequence[Mapping[str, Any]]) -> tuple[list[Result], list[str]]:
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
        actual = dict(result.description)
        if self.task is None:
            actual["task"] = {"name": actual["task"]["name"]}
        if self.methods[result.method] is None:
            actual["method"] = {"name": result.method}
        return stale_differences(dataclasses.replace(result, description=actual), description)

    def _run_missing(self, planned: Sequence[Mapping[str, Any]], console: Console) -> None:
        execution = self.execution
        found, stale = self._load(planned)
        for line in stale:
            console.print(f"note: {line}", soft_wrap=True, style="yellow")
        keys = {run_key(result.description) for result in found}
        folder = execution.output.absolute()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        runs = [
            Run(self.make_task, method, description, folder, execution.checkpoint_seconds)
            for description in planned
            if run_key(description) not in keys and (method := self.methods[description["method"]["name"]])
        ]
        with Progress(f"{self.name}: runs", total=len(planned), completed=len(planned) - len(runs)) as progress:
            options: Any = {"executor": execution.executor, "num_processes": execution.num_processes}
            for run in run_jobs(train_run, runs, **options):
                description = run.description
                progress.advance(metrics=f"{run.method.name} {description['learning_rate']:g} {description['seed']}")
        with contextlib.suppress(OSError):  # Other runs have checkpoints there.
            (folder / "checkpoints").rmdir()


def make_plan(name: str, comparison: Comparison, execution: Execution, *, loads_task: bool) -> Plan:
    """Find what a comparison names, and refuse what cannot be used.

    Args:
      name: of the comparison.
      comparison: what to compare.
      execution: how to run.
      loads_task: whether to load the task, to train it.

    Raises:
      UsageError: if an option cannot be used.
    """
    check_comparison(comparison)
    trainable = [name for name in comparison.methods if name not in comparison.recorded]
    chosen = find_methods(
        trainable,
        comparison.base_optimizer(),
        weight_decay=ADAMW_WEIGHT_DECAY if not comparison.base and comparison.optimizer == "adamw" else 0.0,
        own=comparison.own_methods,
        snapshot_every=comparison.snapshot_every,
    )
    by_name = dict(zip(trainable, chosen, strict=True))
    # The name of a nowcaster's file in tables is its stem.
    methods = {by_name[name].name if name in by_name else name: by_name.get(name) for name in comparison.methods}
    check_evaluation_weights(comparison.evaluation_weights, chosen)
    for method in chosen:  # Before data is loaded: some need a longer run.
        with _errors_of(method.name, comparison):
            method.optimizer(comparison.rates_of(method.name)[0], comparison.num_steps)
    # Absolute, because the workers of a cluster have other working directories.
    factory = comparison.make_task or functools.partial(load_task, comparison.task)
    make_task = functools.partial(factory, execution.data_dir.absolute())
    if not loads_task:
        return Plan(name, comparison, execution, methods, make_task, None)
    task = make_task()
    check_outputs(task)
    target_first(task.metrics, comparison.metric)
    for method in chosen:
        with _errors_of(method.name, comparison):
            check_method(method, task, comparison.rates_of(method.name)[0], comparison.num_steps)
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


def check_evaluation_weights(name: str | None, methods: Sequence[Method]) -> None:
    """Refuse evaluation weights that some method lacks. Those of later stages are only known when they begin.

    Raises:
      UsageError: if there is such a method.
    """
    for method in methods:
        names = all_evaluation_weights(method.evaluation_weights, EMA_DECAYS)
        if name is not None and name not in names and not method.stages:
            raise UsageError(f"--evaluation-weights {name!r}: the method {method.name!r} has only {', '.join(names)}.")


def target_first(metrics: Sequence[Metric], name: str | None) -> tuple[Metric, ...]:
    """Return the metrics, with the target first.

    Raises:
      UsageError: if there is no metric of that name.
    """
    if name is None:
        return tuple(metrics)
    target = look_up({metric.name: metric for metric in metrics}, name, "--metric")
    return target, *(metric for metric in metrics if metric.name != name)


def _place(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a reader of a table would take two runs for the same by."""
    names = ("learning_rate", "seed", "num_steps", "evaluate_every")
    return description["task"]["name"], description["method"]["name"], *(description[name] for name in names)


def main(comparisons: Mapping[str, Comparison], description: str | None, *, benchmark: Sequence[str] = ()) -> None:
    """Run the command line of an experiment.

    Args:
      comparisons: by name.
      description: the docstring of the experiment, for its help.
      benchmark: the comparisons of a table over several tasks.
    """
    name = Path(sys.argv[0]).stem
    options = tyro.cli(
        RunExperiment,
        prog=f"python -m experiments.{name}",
        description=f"{description}\n\nComparisons: {', '.join(comparisons)}.",
        default=RunExperiment(output=Path("runs") / name),
    )
    with one_line_errors():
        run_comparisons(comparisons, options, names=options.comparisons, methods=options.methods, benchmark=benchmark)
