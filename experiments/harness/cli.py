"""The command line of a comparison: every arm with every seed, then the report."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import flax.linen as nn
import tyro
from rich.console import Console

from wnn_jax.meta.arms import ARM_HELP, parse_arms
from wnn_jax.meta.comparison import default_target, run_arms
from wnn_jax.meta.datasets import Dataset
from wnn_jax.meta.end_to_end import Augment, Task
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.report import compare, print_table, save_plot, save_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all experiments have."""

    nowcaster: Annotated[tuple[str, ...], tyro.conf.arg(help=ARM_HELP, metavar="ARM [ARM ...]")] = (
        "none",
        "none+cosine",
        "adaptive-linear",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed is one run per arm, with the same initial weights and data order in all arms."""
    num_epochs: int
    """Length of a run in epochs."""
    batch_size: int
    """Images per step."""
    learning_rate: float
    """Adam's learning rate; the initial one where it decays."""
    snapshot_every: int | None = None
    """Steps between snapshots of the weights. Default: one epoch."""
    evaluate_every: int | None = None
    """Steps between evaluations. Default: as snapshots."""
    checkpoint_seconds: float = 30.0
    """At the first evaluation this long after the last checkpoint (or the start) a checkpoint is saved."""
    ema_decay: float = 0.99
    """Decay per step of the moving average of the weights, evaluated beside the weights in every arm."""
    target: float | None = None
    """Validation accuracy in [0, 1] whose reaching is timed. Default: the lowest final one of the first arm's runs."""
    output: Path
    """Folder for results, plot, table and checkpoints."""
    resume: bool = False
    """Go on in an output folder that has results or checkpoints: finished runs are kept, others continue."""


OptionsT = TypeVar("OptionsT", bound=Options)


def main(options_type: type[OptionsT], make_task: Callable[[OptionsT], Task], record: str | None) -> None:
    """The entry point of an experiment, whose docstring is `record`."""
    program = f"python -m experiments.{Path(sys.argv[0]).stem}"
    description = (record or "").partition("\n\n")[0]
    options = tyro.cli(options_type, prog=program, description=description)
    try:
        run(options, make_task)
    except UsageError as error:
        sys.exit(f"error: {error}")


def make_task(options: Options, *, dataset: Dataset, model: nn.Module, augment: Augment | None) -> Task:
    """A task with the common options applied.

    Raises:
      UsageError: if a batch is larger than the training set.
    """
    steps_per_epoch = len(dataset.train.targets) // options.batch_size
    if steps_per_epoch == 0:
        raise UsageError(f"--batch-size {options.batch_size} exceeds the {len(dataset.train.targets)} training images.")
    snapshot_every = options.snapshot_every or steps_per_epoch
    return Task(
        dataset=dataset,
        model=model,
        augment=augment,
        batch_size=options.batch_size,
        num_epochs=options.num_epochs,
        learning_rate=options.learning_rate,
        snapshot_every=snapshot_every,
        evaluate_every=options.evaluate_every or snapshot_every,
        ema_decay=options.ema_decay,
    )


def run(options: OptionsT, make_task: Callable[[OptionsT], Task]) -> list[dict[str, Any]]:
    """Runs every arm with every seed, and reports.

    Returns:
      The rows of the table.
    """
    check(options)
    arms = parse_arms(options.nowcaster)
    task = make_task(options)
    console = Console(width=None if sys.stdout.isatty() else 132)
    results = run_arms(
        task,
        arms,
        options.seeds,
        options.output,
        console,
        resume=options.resume,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    target = default_target(results) if options.target is None else options.target
    rows = compare(results, target)
    save_table(rows, options.output / "summary.csv")
    save_plot(results, target, options.output / "curves.png")
    print_table(rows, target, console)
    console.print(f"Results: {options.output}  Plot: {options.output / 'curves.png'}", soft_wrap=True)
    return rows


def check(options: Options) -> None:
    """Refuses values that no run can have.

    Raises:
      UsageError: if an option is out of its range.
    """
    positive = ("num_epochs", "batch_size", "learning_rate", "snapshot_every", "evaluate_every")
    for name in positive:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be positive.")
    if options.checkpoint_seconds < 0:
        raise UsageError(f"--checkpoint-seconds {options.checkpoint_seconds} must not be negative.")
    if not 0 <= options.ema_decay < 1:
        raise UsageError(f"--ema-decay {options.ema_decay} must be in [0, 1).")
    if options.target is not None and not 0 < options.target <= 1:
        raise UsageError(f"--target {options.target} must be an accuracy in (0, 1]: 0.65 for 65 %.")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, options.seeds))} must be distinct and not negative.")
