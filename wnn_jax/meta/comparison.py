"""Runs of several arms with several seeds, kept in a folder and resumable."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from wnn_jax.meta.arms import Arm
from wnn_jax.meta.end_to_end import Task, Trainer, describe, save_json
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.progress import RunProgress


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    output: Path,
    console: Console,
    *,
    resume: bool,
    checkpoint_seconds: float,
) -> list[dict[str, Any]]:
    """Runs every arm with every seed.

    Args:
      task: what all arms have in common.
      arms: the arms, the reference first.
      seeds: each is one run per arm, with the same initial weights and data order in all arms.
      output: folder of the results and the checkpoints.
      console: where progress is shown.
      resume: whether to go on in a folder that has results: finished runs are kept, others continue.
      checkpoint_seconds: see `Trainer.run`.

    Returns:
      The results of all runs.

    Raises:
      UsageError: if the folder has results and `resume` is false, or results of another task.
    """
    _prepare(output, task, resume=resume)
    results: list[dict[str, Any]] = []
    trainers = {arm.label: Trainer(task, arm) for arm in arms}
    with RunProgress(console, num_runs=len(arms) * len(seeds), num_steps=task.num_steps) as progress:
        # Seed by seed rather than arm by arm: a machine that slows down then slows all arms alike.
        for seed in seeds:
            results += [_run_or_load(trainers[arm.label], seed, output, progress, checkpoint_seconds) for arm in arms]
    return results


def default_target(results: Sequence[dict[str, Any]]) -> float:
    """The lowest final validation accuracy of the first arm's runs."""
    reference = results[0]["arm"]
    return min(result["evaluations"][-1]["accuracy"] for result in results if result["arm"] == reference)


def _prepare(output: Path, task: Task, *, resume: bool) -> None:
    """Makes the output folder, or checks that what is in it is of the same task."""
    settings_file = output / "settings.json"
    settings = describe(task)
    if settings_file.exists():
        if not resume:
            raise UsageError(f"--output {output} already has results. Go on with --resume, or choose another folder.")
        before = json.loads(settings_file.read_text())
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            raise UsageError(
                f"--resume: the runs in {output} had other settings: "
                + ", ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in changed)
                + ". Use the same options, or choose another --output."
            )
    else:
        output.mkdir(parents=True, exist_ok=True)
        save_json(settings, settings_file)


def _run_or_load(
    trainer: Trainer, seed: int, output: Path, progress: RunProgress, checkpoint_seconds: float
) -> dict[str, Any]:
    name = f"{trainer.arm.label}-seed{seed}"
    result_file = output / f"{name}.json"
    with progress.run(name) as report:
        if not result_file.exists():
            checkpoints = output / "checkpoints" / name
            save_json(trainer.run(seed, checkpoints, report, checkpoint_seconds), result_file)
            shutil.rmtree(checkpoints, ignore_errors=True)
    return json.loads(result_file.read_text())
