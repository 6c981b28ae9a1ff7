"""Comparing arms: every arm with every seed, at its own best learning rate."""

import contextlib
import dataclasses
import functools
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from wnn_jax.meta.errors import UsageError, check_options, one_line_errors
from wnn_jax.meta.evaluation.arms import ARM_HELP, find_arms
from wnn_jax.meta.evaluation.plots import plot_curves, plot_learning_rates
from wnn_jax.meta.evaluation.report import print_table
from wnn_jax.meta.evaluation.results import (
    Result,
    describe_run,
    load_results,
    refuse_old_folder,
    result_file,
    save_result,
)
from wnn_jax.meta.evaluation.summary import Row, best_rates, summarize
from wnn_jax.meta.output import save_rows
from wnn_jax.meta.progress import Progress
from wnn_jax.meta.tasks import TASKS, Metric, Task, load_task
from wnn_jax.meta.training.arm import Arm
from wnn_jax.meta.training.executors import run_all
from wnn_jax.meta.training.keys import describe_task, run_key
from wnn_jax.meta.training.optimizers import ADAMW_WEIGHT_DECAY, BASE_OPTIMIZERS, BaseOptimizer, base_optimizer
from wnn_jax.meta.training.readings import EMA_DECAYS, all_readings
from wnn_jax.meta.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare ways to train: how many steps each one saves, at its own best learning rate.

    Called again, it goes on: finished runs are kept, interrupted ones continue from their last checkpoint, and the
    result of a run is only ever shown for what made it.
    """

    task: Annotated[str, tyro.conf.arg(help=f"What to train: {', '.join(TASKS)}.", metavar="TASK")]
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help=ARM_HELP, metavar="ARM [ARM ...]")] = (
        "plain",
        "wsd",
        "ademamix-3",
        "adaptive-linear",
    )
    optimizer: Annotated[str, tyro.conf.arg(help=f"What the arms train with: {', '.join(BASE_OPTIMIZERS)}.")] = "adam"
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    """Every arm trains at each of them, and is shown at its best one, chosen on the validation split."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one run per arm, with the same initial weights and data order in all arms."""
    search_seeds: tuple[int, ...] | None = None
    """Seeds to choose the learning rates with; the seeds of the result are then run at the best rate only. Default: the
    seeds of the result, at all rates."""
    num_steps: int = 3_000
    """Length of a run in optimizer steps."""
    evaluate_every: int | None = None
    """Steps between evaluations. Default: 40 evaluations in all."""
    snapshot_every: int | None = None
    """Steps between the snapshots of nowcasters that forecast from a window of them. Default: 30 snapshots in all."""
    metric: str | None = None
    """What counts. Default: the first metric of the task."""
    target: float | None = None
    """Value of the metric whose reaching is timed. Default: for every seed, the best value of the best plain arm."""
    reading: str | None = None
    """What to read in every arm, for example `weights` for the weights as they are. Default: the best of the weights,
    their moving averages, and what else an arm offers."""
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
    """To train on a cluster: address of a dask scheduler, such as tcp://HOST:8786, or its scheduler file, which ends in
    .json. Default: this machine."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a comparison, with all that a worker needs to make it.

    Attributes:
      make_task: makes the task, on the machine that trains it.
      arm: how to train.
      description: what makes its result.
      folder: of the results.
      checkpoint_seconds: see `Trainer.fit`.
    """

    make_task: Callable[[], Task]
    arm: Arm
    description: Mapping[str, Any]
    folder: Path
    checkpoint_seconds: float

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return result_file(self.folder, self.description)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints" / self.file.stem


def compare(
    options: Compare,
    *,
    make_task: Callable[[Path], Task] | None = None,
    base: BaseOptimizer | None = None,
    arms: Mapping[str, Arm] | None = None,
) -> list[Row]:
    """Runs a comparison, and reports: a table, as text and as CSV, and two plots.

    Args:
      options: what to compare.
      make_task: makes the task of the data folder. Default: `options.task` is the name of a known one.
      base: makes the optimizer that the arms train with. Default: `options.optimizer` is the name of a known one.
      arms: further arms by name.

    Returns:
      The rows of the table, one per arm.

    Raises:
      UsageError: if an option cannot be used.
    """
    check(options)
    task_factory = make_task or functools.partial(load_task, options.task)
    chosen = find_arms(
        options.arms,
        base or base_optimizer(options.optimizer),
        weight_decay=ADAMW_WEIGHT_DECAY if base is None and options.optimizer == "adamw" else 0.0,
        further=arms,
        snapshot_every=options.snapshot_every,
    )
    refuse_old_folder(options.output)
    check_reading(options.reading, chosen)
    # Absolute, because the workers of a cluster have working directories of their own.
    make_this_task = functools.partial(task_factory, options.data_dir.absolute())
    task = make_this_task()
    metrics = target_first(task.metrics, options.metric)
    console = Console(width=None if sys.stdout.isatty() else 140)
    plan = functools.partial(_plan, options, make_this_task, task, describe_task(task))

    grid = [(arm, rate) for arm in chosen for rate in options.learning_rates]
    searched = _run_missing(plan(grid, options.search_seeds or options.seeds), options, console)
    rates = best_rates(searched, metrics[0], options.reading)
    if options.search_seeds is None:
        results = [result for result in searched if result.learning_rate == rates[result.arm]]
    else:
        results = _run_missing(plan([(arm, rates[arm.name]) for arm in chosen], options.seeds), options, console)
    plain = [arm.name for arm in chosen if arm.is_plain]
    rows = summarize(
        results,
        metrics,
        plain=plain,
        learning_rates=options.learning_rates,
        reading=options.reading,
        target=options.target,
    )
    save_rows(rows, options.output / "summary.csv")
    plot_curves(results, rows, metrics[0], options.output / "curves.png", reading=options.reading)
    rates_plot = options.output / "learning-rates.png"
    if len(options.learning_rates) > 1:
        plot_learning_rates(searched, metrics[0], rates_plot, reading=options.reading)
    else:
        rates_plot.unlink(missing_ok=True)  # It would be of another call.
    print_table(rows, metrics, console, has_own_target=options.target is not None)
    console.print(f"Results and plots: {options.output}", soft_wrap=True)
    return rows


def check_reading(reading: str | None, arms: Sequence[Arm]) -> None:
    """Refuses a reading that some arm does not have. Those of further stages are only known when they begin.

    Raises:
      UsageError: if there is such an arm.
    """
    for arm in arms:
        names = all_readings(arm.readings, EMA_DECAYS)
        if reading is not None and reading not in names and not arm.stages:
            raise UsageError(f"--reading {reading!r} is not one of the arm {arm.name!r}: {', '.join(names)}.")


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
    rates = options.learning_rates
    if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(
            f"--learning-rates {' '.join(f'{rate:g}' for rate in rates) or '(none)'} must be at least one rate, all of "
            "them distinct, finite and positive."
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


def _plan(
    options: Compare,
    make_task: Callable[[], Task],
    task: Task,
    task_description: Mapping[str, Any],
    arms: Sequence[tuple[Arm, float]],
    seeds: Sequence[int],
) -> list[Run]:
    """All runs of arms at learning rates, seed by seed, so that a machine that slows down slows all arms alike."""
    evaluate_every = options.evaluate_every or max(options.num_steps // 40, 1)
    described = [
        (
            arm,
            describe_run(
                task,
                arm,
                task_description=task_description,
                learning_rate=rate,
                num_steps=options.num_steps,
                evaluate_every=evaluate_every,
            ),
        )
        for arm, rate in arms
    ]
    folder = (options.output / "runs").absolute()
    return [
        Run(make_task, arm, {**description, "seed": seed}, folder, options.checkpoint_seconds)
        for seed in seeds
        for arm, description in described
    ]


def _run_missing(runs: Sequence[Run], options: Compare, console: Console) -> list[Result]:
    """Makes the results that are missing, and reads all of them."""
    for run in runs:
        if not options.resume:
            run.file.unlink(missing_ok=True)
            shutil.rmtree(run.checkpoints, ignore_errors=True)
    folder = options.output / "runs"
    planned = [run.description for run in runs]
    _, stale = load_results(folder, planned)
    for line in stale:
        console.print(f"note: {line}", soft_wrap=True, style="yellow")
    missing = [run for run in runs if not run.file.exists()]
    with Progress("runs", total=len(runs), completed=len(runs) - len(missing)) as progress:
        for _, metrics in run_all(train_run, missing, executor=options.executor, num_processes=options.num_processes):
            progress.advance(metrics=metrics)
    results, _ = load_results(folder, planned)
    return results


def train_run(run: Run) -> str:
    """Makes the result of a run, if it is not there.

    Returns:
      A line for the log.
    """
    if not run.file.exists():
        description = run.description
        fitted = _trainer(run).fit(description["seed"], run.checkpoints, checkpoint_seconds=run.checkpoint_seconds)
        save_result(run.file, description, fitted)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        with contextlib.suppress(OSError):  # Other runs have checkpoints there.
            run.checkpoints.parent.rmdir()
    return run.file.stem


# One per arm and rate in every process, so that all seeds share a compiled program.
_TRAINERS: dict[str, Trainer] = {}
_MAX_TRAINERS = 32


def _trainer(run: Run) -> Trainer:
    key = run_key({name: value for name, value in run.description.items() if name != "seed"})
    if key not in _TRAINERS:
        while len(_TRAINERS) >= _MAX_TRAINERS:
            _TRAINERS.pop(next(iter(_TRAINERS)))
        _TRAINERS[key] = Trainer(
            run.make_task(),
            run.arm,
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
    arms: Mapping[str, Arm] | None = None,
) -> None:
    """The entry point of an experiment: a configuration, whose docstring is its record.

    Args:
      config: the defaults of all options.
      record: the docstring, whose first paragraph describes the experiment in its help.
      make_task: see `compare`.
      base: see `compare`.
      arms: see `compare`.
    """
    description = (record or "").partition("\n\n")[0]
    program = f"python -m experiments.{Path(sys.argv[0]).stem}"
    options = tyro.cli(Compare, prog=program, description=description, default=config)
    with one_line_errors():
        compare(options, make_task=make_task, base=base, arms=arms)
