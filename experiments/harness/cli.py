"""The command line and the course of a comparison: every arm with every seed, then the report."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import flax.linen as nn
import tyro
from rich.console import Console

from experiments.harness.arms import ARM_HELP, parse_arms
from experiments.harness.data import Dataset
from experiments.harness.errors import UsageError
from experiments.harness.progress import RunProgress
from experiments.harness.report import compare, print_table, save_plot, save_table
from experiments.harness.training import Augment, Task, Trainer, describe, save_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all experiments have."""

    nowcaster: Annotated[tuple[str, ...], tyro.conf.arg(help=ARM_HELP, metavar="ARM [ARM ...]")] = (
        "none",
        "none+cosine",
        "linear",
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
    steps_per_epoch = len(dataset.train.labels) // options.batch_size
    if steps_per_epoch == 0:
        raise UsageError(f"--batch-size {options.batch_size} exceeds the {len(dataset.train.labels)} training images.")
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
    _prepare_output(options, task)
    results: list[dict[str, Any]] = []
    trainers = {arm.label: Trainer(task, arm) for arm in arms}
    with RunProgress(console, num_runs=len(arms) * len(options.seeds), num_steps=task.num_steps) as progress:
        # Seed by seed rather than arm by arm: a machine that slows down then slows all arms alike.
        for seed in options.seeds:
            results += [_run_or_load(trainers[arm.label], seed, options, progress) for arm in arms]
    target = options.target
    if target is None:
        target = min(r["evaluations"][-1]["accuracy"] for r in results if r["arm"] == arms[0].label)
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


def _prepare_output(options: Options, task: Task) -> None:
    """Makes the output folder, or checks that what is in it is of the same task."""
    settings_file = options.output / "settings.json"
    settings = describe(task)
    if settings_file.exists():
        if not options.resume:
            raise UsageError(
                f"--output {options.output} already has results. Go on with --resume, or choose another folder."
            )
        before = json.loads(settings_file.read_text())
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            raise UsageError(
                f"--resume: the runs in {options.output} had other settings: "
                + ", ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in changed)
                + ". Use the same options, or choose another --output."
            )
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        save_json(settings, settings_file)


def _run_or_load(trainer: Trainer, seed: int, options: Options, progress: RunProgress) -> dict[str, Any]:
    name = f"{trainer.arm.label}-seed{seed}"
    result_file = options.output / f"{name}.json"
    with progress.run(name) as report:
        if not result_file.exists():
            checkpoints = options.output / "checkpoints" / name
            save_json(trainer.run(seed, checkpoints, report, options.checkpoint_seconds), result_file)
            shutil.rmtree(checkpoints, ignore_errors=True)
    return json.loads(result_file.read_text())
