"""All that the property tests call of `wnn_jax.lab`: files that may be damaged, and programs that may be killed."""

import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import wnn_jax
from tests.lab.conftest import NUM_RUNS, TINY, tiny_family
from tests.lab.toys import LinearRegression
from wnn_jax.lab.comparing.comparison import Compare, compare
from wnn_jax.lab.comparing.results import Result, add_result, load_results
from wnn_jax.lab.errors import UsageError, one_line_errors
from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.forecasting.train import Train, train
from wnn_jax.lab.forecasting.trajectories import load_trajectories, save_trajectory
from wnn_jax.lab.tasks import families
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.checkpoints import load_state, save_state
from wnn_jax.lab.training.trainer import Evaluation

_STATE = {"w": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), "count": np.int32(7)}


class Files(NamedTuple):
    """Files that may be damaged: how to write them to a folder, how to read what they hold, and what that raises."""

    write: Callable[[Path], None]
    read: Callable[[Path], Mapping[str, Any]]
    errors: tuple[type[Exception], ...] = (UsageError,)


class Program(NamedTuple):
    """A program that may be killed.

    Attributes:
      run: works in a folder, the first argument.
      results: what is in such a folder; while the program is unfinished, a part of what will be.
      needs: the program whose finished folder is the second argument of `run`.
    """

    run: Callable[[Path, Path | None], Any]
    results: Callable[[Path], Mapping[str, Any]]
    needs: str | None = None


def _write_collection(folder: Path) -> None:
    rng, family = np.random.default_rng(0), tiny_family()
    for index in range(3):
        snapshots = [{"Dense_0": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}} for _ in range(5)]
        save_trajectory(folder, family, index, snapshots, rng.random(5).tolist(), {"loss": 0.5, "accuracy": 0.75})


def _read_collection(folder: Path) -> dict[str, Any]:
    return {
        str(run.index): (run.settings, run.split, run.leaves, run.losses, run.validation, run.snapshots.tobytes())
        for run in load_trajectories([folder])
    }


def _write_result(folder: Path) -> None:
    scores = {"weights": {"loss": 0.25}}
    evaluations = [Evaluation(20, 1.0, 0.5, scores, num_nowcasts=0, num_rejected=0)]
    description = {"method": {"name": "sgd"}, "learning_rate": 0.1, "seed": 0, "num_steps": 20}
    add_result(folder, Result(description, (Metric("loss", higher_is_better=False),), evaluations, scores))


def _read_result(folder: Path) -> dict[str, Any]:
    return {str(result.seed): dataclasses.asdict(result) for result in load_results(folder)}


def _write_checkpoint(folder: Path) -> None:
    save_state(folder / "20", _STATE, {"losses": [0.5, 0.25]})


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    state, log = load_state(folder / "20", _STATE)
    return {"state": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], "log": log}


FILES = {
    "collection": Files(_write_collection, _read_collection),
    "result": Files(_write_result, _read_result),
    "checkpoint": Files(_write_checkpoint, _read_checkpoint),
}


def _collect(folder: Path, _: Path | None) -> None:
    collect(Collect(output=folder, family=TINY, num_runs=NUM_RUNS, num_processes=1))


def _collected(folder: Path) -> dict[str, Any]:
    return _read_collection(folder) if list(folder.glob("run-*.npz")) else {}


def _train(folder: Path, collection: Path | None) -> None:
    assert collection is not None
    sizes: Any = {"num_steps": 24, "windows_per_role": 2, "num_weights": 8, "validate_every": 4}
    train(Train(collection=(collection,), output=folder, **sizes))


def _trained(folder: Path) -> dict[str, Any]:
    file = folder / "nowcaster.npz"
    nowcaster: Any = wnn_jax.load(file) if file.exists() else None
    # The score on the test runs is written last.
    return {"nowcaster": file.read_bytes()} if nowcaster is not None and "test" in nowcaster.record else {}


def _compare(folder: Path, _: Path | None) -> None:
    sizes: Any = {"num_steps": 16, "evaluate_every": 2, "checkpoint_seconds": 0.0, "num_processes": 1}
    what: Any = {"methods": ("plain", "linear"), "learning_rates": (0.1,), "seeds": (0, 1)}
    compare(Compare(task="toy", make_task=lambda _: LinearRegression(), output=folder, **what, **sizes))


def _compared(folder: Path) -> dict[str, Any]:
    results = {}
    for result in load_results(folder):
        evaluations = [dataclasses.replace(evaluation, seconds=0.0) for evaluation in result.evaluations]
        results[f"{result.method} {result.seed}"] = (result.description, evaluations, result.test)
    return results


PROGRAMS = {
    "collect": Program(_collect, _collected),
    "train": Program(_train, _trained, needs="collect"),
    "compare": Program(_compare, _compared),
}


def run_and_kill(name: str, folder: Path, needed: Path | None, kill_at: int | None, num_events: Any) -> None:
    """Runs a program, and kills this process before what it does to files in the folder for the `kill_at`-th time.

    `num_events` is a shared integer: how often it did something to a file so far.
    """
    jax.config.update("jax_platforms", "cpu")
    families.FAMILIES = {TINY: tiny_family()}
    numbers = itertools.count()

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        is_of_file = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if is_of_file and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            num_events.value = number = next(numbers)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    with one_line_errors():
        PROGRAMS[name].run(folder, needed)
