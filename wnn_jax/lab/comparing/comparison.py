"""Comparing methods: every method with every seed, at its own best learning rate."""

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from wnn_jax.lab.comparing.methods import METHOD_HELP, find_methods
from wnn_jax.lab.comparing.plots import plot_curves, plot_learning_rates
from wnn_jax.lab.comparing.results import (
    Result,
    describe_run,
    load_results,
    refuse_old_folder,
    result_file,
    save_result,
)
from wnn_jax.lab.comparing.summary import Row, best_rates, summarize
from wnn_jax.lab.comparing.tables import print_table
from wnn_jax.lab.errors import UsageError, check_options, one_line_errors
from wnn_jax.lab.jobs_claims import claim, run_shared
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks import TASKS, Metric, Task, load_task
from wnn_jax.lab.training.evaluation_weights import EMA_DECAYS, all_readings
from wnn_jax.lab.training.keys import describe_task, run_key
from wnn_jax.lab.training.method import Method, check_method
from wnn_jax.lab.training.optimizers import ADAMW_WEIGHT_DECAY, BASE_OPTIMIZERS, BaseOptimizer, base_optimizer
from wnn_jax.lab.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare ways to train: how many steps each one saves, at its own best learning rate.

    Called again, it goes on: finished runs are kept, interrupted ones continue from their last checkpoint, and the
    result of a run is only ever shown for what made it. Several processes can work on one folder: each makes runs that
    no other one does.
    """

    task: Annotated[str, tyro.conf.arg(help=f"What to train: {', '.join(TASKS)}.", metavar="TASK")]
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=METHOD_HELP, metavar="METHOD [METHOD ...]")] = (
        "plain",
        "wsd",
        "ademamix-3",
        "pooled-linear",
    )
    optimizer: Annotated[str, tyro.conf.arg(help=f"What the methods train with: {', '.join(BASE_OPTIMIZERS)}.")] = (
        "adam"
    )
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    """Every method trains at each of them, and is shown at its best one, chosen on the validation split."""
    own_rates: Annotated[Mapping[str, tuple[float, ...]], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Other learning rates than those for single methods, whose optimizers take rates of another size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one run per method, with the same initial weights and data order in all methods."""
    search_seeds: tuple[int, ...] | None = None
    """Seeds that choose the learning rates; `seeds` then run at the best rate alone. Default: `seeds`, at all rates."""
    num_steps: int = 3_000
    """Length of a run in optimizer steps."""
    evaluate_every: int | None = None
    """Steps between evaluations. Default: 40 evaluations in all."""
    snapshot_every: int | None = None
    """Steps between snapshots, for nowcasters that forecast from a window of them. Default: 30 snapshots in all."""
    metric: str | None = None
    """What counts. Default: the first metric of the task."""
    target: float | None = None
    """Value of the metric whose reaching is timed. Default: for every seed, the best value of the best plain method."""
    reading: str | None = None
    """What to read in every method, such as `weights`. Default: the best of weights, moving averages and the method's own."""
    output: Path = Path("runs/comparison")
    """Folder for table, plots and results."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    resume: bool = True
    """Whether to keep finished and interrupted runs; otherwise all of them begin anew."""
    checkpoint_seconds: float = 30.0
    """At the first evaluation this long after the last checkpoint (or the start) a checkpoint is saved."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU, one on an accelerator."""
    executor: str | None = None
    """Dask scheduler to train on: an address such as tcp://HOST:8786, or a scheduler file. Default: this machine."""

    def rates_of(self, method: str) -> tuple[float, ...]:
        """The learning rates that a method trains at."""
        return self.own_rates.get(method, self.learning_rates)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a comparison, with all that a worker needs to make it.

    Attributes:
      make_task: makes the task, on the machine that trains it.
      method: how to train.
      description: what makes its result.
      folder: of the results.
      checkpoint_seconds: see `Trainer.fit`.
    """

    make_task: Callable[[], Task]
    method: Method
    description: Mapping[str, Any]
    folder: Path
    checkpoint_seconds: float

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return result_file(self.folder, self.description)

    @property
    def files(self) -> list[Path]:
        """The same, as `run_shared` wants it."""
        return [self.file]

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints" / self.file.stem

    def remove_checkpoints(self) -> None:
        """Removes them, if there are any."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        with contextlib.suppress(OSError):  # Other runs have checkpoints there.
            self.checkpoints.parent.rmdir()


def compare(
    options: Compare,
    *,
    make_task: Callable[[Path], Task] | None = None,
    base: BaseOptimizer | None = None,
    methods: Mapping[str, Method] | None = None,
) -> list[Row]:
    """Runs a comparison, and reports: a table, as text and as CSV, and two plots.

    Args:
      options: what to compare.
      make_task: makes the task of the data folder. Default: `options.task` is the name of a known one.
      base: makes the optimizer that the methods train with. Default: `options.optimizer` is the name of a known one.
      methods: further methods by name.

    Returns:
      The rows of the table, one per method.

    Raises:
      UsageError: if an option cannot be used.
    """
    plan = make_plan(options, make_task=make_task, base=base, methods=methods)
    console = make_console()
    plan.train(console)
    return plan.report(console)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A comparison whose options can be used.

    Attributes:
      options: what to compare.
      methods: by name.
      metrics: of the task, the target first.
      make_task: makes the task, on any machine.
      task: what is trained.
      task_description: of `describe_task`.
    """

    options: Compare
    methods: Mapping[str, Method]
    metrics: tuple[Metric, ...]
    make_task: Callable[[], Task]
    task: Task
    task_description: Mapping[str, Any]
    _descriptions: dict[tuple[str, float], dict[str, Any]] = dataclasses.field(default_factory=dict)

    def train(self, console: Console, names: Sequence[str] | None = None) -> None:
        """Makes the results that are missing.

        Args:
          console: where to name results of something else.
          names: of the methods to train. Default: all.
        """
        names = tuple(self.methods) if names is None else names
        self._run_missing(self._search(names), console)
        if self.options.search_seeds is not None:
            self._run_missing(self._final(names, self._load(self._search(names))), console)

    def finished(self) -> tuple[list[Result], list[Result]]:
        """The results of all methods of which none is missing: of the search for the best rates, and at these."""
        searched = self._load(self._search(tuple(self.methods)))
        complete = [name for name in self.methods if _count(searched, name) == len(self._search([name]))]
        searched = [result for result in searched if result.method in complete]
        if self.options.search_seeds is None:
            rates = best_rates(searched, self.metrics[0], self.options.reading)
            return searched, [result for result in searched if result.learning_rate == rates[result.method]]
        results = self._load(self._final(complete, searched))
        complete = [name for name in complete if _count(results, name) == len(self.options.seeds)]
        searched, results = ([run for run in each if run.method in complete] for each in (searched, results))
        return searched, results

    def report(self, console: Console) -> list[Row]:
        """Reports on the methods that are finished: a table, as text and as CSV, and two plots.

        Returns:
          The rows of the table, one per method; none where there is no reference yet, because a plain method is missing.
        """
        options, metric = self.options, self.metrics[0]
        searched, results = self.finished()
        plain = [name for name, method in self.methods.items() if method.is_plain]
        done = {result.method for result in results}
        if not done or not done.issuperset(plain):
            return []
        rows = summarize(
            results,
            self.metrics,
            plain=plain,
            learning_rates={name: options.rates_of(name) for name in self.methods},
            reading=options.reading,
            target=options.target,
        )
        save_rows(rows, options.output / "summary.csv")
        plot_curves(results, rows, metric, options.output / "curves.png", reading=options.reading)
        rates_plot = options.output / "learning-rates.png"
        if len({result.learning_rate for result in searched}) > 1:
            plot_learning_rates(searched, metric, rates_plot, reading=options.reading)
        else:
            rates_plot.unlink(missing_ok=True)  # It would be of another call.
        print_table(rows, self.metrics, console, has_own_target=options.target is not None)
        console.print(f"Results and plots: {options.output}", soft_wrap=True)
        return rows

    def _search(self, names: Sequence[str]) -> list[Run]:
        """The runs that the learning rates of methods are chosen by."""
        grid = [(name, rate) for name in names for rate in self.options.rates_of(name)]
        return self._runs(grid, self.options.search_seeds or self.options.seeds)

    def _final(self, names: Sequence[str], searched: Sequence[Result]) -> list[Run]:
        """The runs of methods at their best rates."""
        rates = best_rates(searched, self.metrics[0], self.options.reading)
        return self._runs([(name, rates[name]) for name in names], self.options.seeds)

    def _runs(self, methods: Sequence[tuple[str, float]], seeds: Sequence[int]) -> list[Run]:
        """All runs of methods at rates, seed by seed, so that a machine that slows down slows all methods alike."""
        folder = (self.options.output / "runs").absolute()
        return [
            Run(
                self.make_task,
                self.methods[name],
                {**self._describe(name, rate), "seed": seed},
                folder,
                self.options.checkpoint_seconds,
            )
            for seed in seeds
            for name, rate in methods
        ]

    def _describe(self, name: str, rate: float) -> dict[str, Any]:
        if (name, rate) not in self._descriptions:
            self._descriptions[name, rate] = describe_run(
                self.task,
                self.methods[name],
                task_description=self.task_description,
                learning_rate=rate,
                num_steps=self.options.num_steps,
                evaluate_every=self.options.evaluate_every or max(self.options.num_steps // 40, 1),
            )
        return self._descriptions[name, rate]

    def _load(self, runs: Sequence[Run]) -> list[Result]:
        results, _ = load_results(self.options.output / "runs", [run.description for run in runs])
        return results

    def _run_missing(self, runs: Sequence[Run], console: Console) -> None:
        options = self.options
        for run in runs:
            if not options.resume:
                run.file.unlink(missing_ok=True)
                run.remove_checkpoints()
        _, stale = load_results(options.output / "runs", [run.description for run in runs])
        for line in stale:
            console.print(f"note: {line}", soft_wrap=True, style="yellow")
        missing = [run for run in runs if not run.file.exists()]
        (options.output / "runs").mkdir(parents=True, exist_ok=True)
        with Progress("runs", total=len(runs), completed=len(runs) - len(missing)) as progress:
            for run in run_shared(train_run, missing, executor=options.executor, num_processes=options.num_processes):
                progress.advance(metrics=run.file.stem)
        for run in runs:  # Of processes that were killed right after they had saved a result.
            run.remove_checkpoints()


def make_plan(
    options: Compare,
    *,
    make_task: Callable[[Path], Task] | None = None,
    base: BaseOptimizer | None = None,
    methods: Mapping[str, Method] | None = None,
) -> Plan:
    """Finds what options name, and refuses those that cannot be used. Args and Raises as of `compare`."""
    check(options)
    task_factory = make_task or functools.partial(load_task, options.task)
    chosen = find_methods(
        options.methods,
        base or base_optimizer(options.optimizer),
        weight_decay=ADAMW_WEIGHT_DECAY if base is None and options.optimizer == "adamw" else 0.0,
        further=methods,
        snapshot_every=options.snapshot_every,
    )
    refuse_old_folder(options.output)
    check_reading(options.reading, chosen)
    for method in chosen:  # Before data is loaded: some need a longer training.
        with _errors_of(method.name, options):
            method.optimizer(options.rates_of(method.name)[0], options.num_steps)
    # Absolute, because the workers of a cluster have working directories of their own.
    make_this_task = functools.partial(task_factory, options.data_dir.absolute())
    task = make_this_task()
    task_description = describe_task(task)
    for method in chosen:
        with _errors_of(method.name, options):
            check_method(method, task, options.rates_of(method.name)[0], options.num_steps)
    return Plan(
        options,
        {method.name: method for method in chosen},
        target_first(task.metrics, options.metric),
        make_this_task,
        task,
        task_description,
    )


@contextlib.contextmanager
def _errors_of(method: str, options: Compare) -> Generator[None]:
    """Says of an error, in one line, which method does not fit the task or the length of the training."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"--methods {method!r} does not fit --task {options.task!r} or --num-steps {options.num_steps}, change one of "
            f"them: {' '.join(str(error).split())}"
        ) from error


def make_console() -> Console:
    """Where tables are printed, 140 columns wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _count(results: Sequence[Result], method: str) -> int:
    return sum(result.method == method for result in results)


def check_reading(reading: str | None, methods: Sequence[Method]) -> None:
    """Refuses a reading that some method does not have. Those of further stages are only known when they begin.

    Raises:
      UsageError: if there is such a method.
    """
    for method in methods:
        names = all_readings(method.readings, EMA_DECAYS)
        if reading is not None and reading not in names and not method.stages:
            raise UsageError(f"--reading {reading!r} is not one of the method {method.name!r}: {', '.join(names)}.")


def target_first(metrics: Sequence[Metric], name: str | None) -> tuple[Metric, ...]:
    """The metrics, the one that counts first.

    Raises:
      UsageError: if there is none of that name.
    """
    by_name = {metric.name: metric for metric in metrics}
    if name is None:
        return tuple(metrics)
    if name not in by_name:
        raise UsageError(f"--metric {name!r} is not one of the task's: {', '.join(by_name)}.")
    return by_name[name], *(metric for metric in metrics if metric.name != name)


def check(options: Compare) -> None:
    """Refuses values that no comparison can have.

    Raises:
      UsageError: if an option is out of its range.
    """
    check_options(options, positive=("num_steps", "evaluate_every", "snapshot_every", "num_processes"))
    for rates in (options.learning_rates, *options.own_rates.values()):
        if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UsageError(
                f"--learning-rates {' '.join(f'{rate:g}' for rate in rates) or '(none)'} must be at least one rate, "
                "all of them distinct, finite and positive."
            )
    for name, seeds in (("seeds", options.seeds), ("search-seeds", options.search_seeds)):
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise UsageError(
                f"--{name} {' '.join(map(str, seeds)) or '(none)'} must be at least one, distinct and not negative."
            )
    if options.checkpoint_seconds < 0:
        raise UsageError(f"--checkpoint-seconds {options.checkpoint_seconds} must not be negative.")
    if options.target is not None and not math.isfinite(options.target):
        raise UsageError(f"--target {options.target} must be a value of the metric that counts.")
    for name in ("evaluate_every", "snapshot_every"):
        every = getattr(options, name)
        if every is not None and every > options.num_steps:
            raise UsageError(f"--{name.replace('_', '-')} {every} must not exceed --num-steps {options.num_steps}.")
    if options.output.exists() and not options.output.is_dir():
        raise UsageError(f"--output {options.output} is a file; name a folder.")


def train_run(run: Run) -> None:
    """Makes the result of a run, if it is not there and no other process makes it."""
    with claim(run.file) as is_granted:
        if not is_granted or run.file.exists():
            return
        description = run.description
        fitted = _trainer(run).fit(description["seed"], run.checkpoints, checkpoint_seconds=run.checkpoint_seconds)
        save_result(run.file, description, fitted)
        run.remove_checkpoints()


# One per method and rate in every process, so that all seeds share a compiled program.
_TRAINERS: dict[str, Trainer] = {}
_MAX_TRAINERS = 32


def _trainer(run: Run) -> Trainer:
    key = run_key({name: value for name, value in run.description.items() if name != "seed"})
    if key not in _TRAINERS:
        while len(_TRAINERS) >= _MAX_TRAINERS:
            _TRAINERS.pop(next(iter(_TRAINERS)))
        _TRAINERS[key] = Trainer(
            run.make_task(),
            run.method,
            learning_rate=run.description["learning_rate"],
            num_steps=run.description["num_steps"],
            evaluate_every=run.description["evaluate_every"],
        )
    return _TRAINERS[key]


def main(
    config: Compare,
    record: str | None,
    *,
    make_task: Callable[[Path], Task] | None = None,
    base: BaseOptimizer | None = None,
    methods: Mapping[str, Method] | None = None,
) -> None:
    """The entry point of an experiment: a configuration, whose docstring is its record.

    Args:
      config: the defaults of all options.
      record: the docstring, whose first paragraph describes the experiment in its help.
      make_task: see `compare`.
      base: see `compare`.
      methods: see `compare`.
    """
    description = (record or "").partition("\n\n")[0]
    program = f"python -m experiments.{Path(sys.argv[0]).stem}"
    options = tyro.cli(Compare, prog=program, description=description, default=config)
    with one_line_errors():
        for name, own in (("task", make_task), ("optimizer", base)):
            if own is not None and getattr(options, name) != getattr(config, name):
                raise UsageError(
                    f"--{name} {getattr(options, name)!r} has no effect, because the {name} is the experiment's own; "
                    "leave it out, or give it to wnn-jax compare."
                )
        compare(options, make_task=make_task, base=base, methods=methods)
