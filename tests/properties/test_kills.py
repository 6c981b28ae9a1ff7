"""A program that is killed at any moment, any number of times, ends with the results of an undisturbed program."""

import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest

import wnn_jax
from tests.lab.conftest import NUM_RUNS, TINY, tiny_family
from tests.lab.toys import LinearRegression
from tests.properties.strategies import generators, num_examples
from tests.properties.test_damage import read_collection
from wnn_jax.lab.comparing.comparison import Compare, compare
from wnn_jax.lab.comparing.results import load_results
from wnn_jax.lab.errors import one_line_errors
from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.forecasting.families import FAMILIES
from wnn_jax.lab.forecasting.train import Train, train


class Program(NamedTuple):
    """A program that may be killed."""

    run: Callable[[Path, Path | None], Any]
    """Works in the first folder. The second one is the finished folder of the program that it `needs`."""
    results: Callable[[Path], Mapping[str, Any]]
    """Reads the results in a folder: a part of the final results while the program is unfinished."""
    needs: str | None = None


def _collect(folder: Path, _: Path | None) -> None:
    collect(Collect(output=folder, family=TINY, num_runs=NUM_RUNS, num_processes=1))


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


_PROGRAMS = {
    "collect": Program(_collect, lambda folder: read_collection(folder) if [*folder.glob("run-*.npz")] else {}),
    "train": Program(_train, _trained, needs="collect"),
    "compare": Program(_compare, _compared),
}


def _run_and_kill(name: str, folder: Path, needed: Path | None, kill_at: int | None, num_events: Any) -> None:
    """Run a program, and kill this process before event `kill_at` of a file; `num_events` counts events so far."""
    jax.config.update("jax_platforms", "cpu")
    FAMILIES[TINY] = tiny_family()
    numbers = itertools.count()

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(
            f"{folder}{os.sep}"
        ):
            num_events.value = number = next(numbers)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    with one_line_errors():
        _PROGRAMS[name].run(folder, needed)


# Forked from a process that has imported the programs: a new one would take ten times as long to begin.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.properties.test_kills"])


@pytest.mark.slow
@pytest.mark.parametrize("name", _PROGRAMS)
@hypothesis.settings(max_examples=num_examples(0.05))
@hypothesis.given(rng=generators())
def test_a_killed_program_goes_on_to_the_same_results(name: str, rng: np.random.Generator):
    undisturbed, num_events = _undisturbed(name)
    expected = _PROGRAMS[name].results(undisturbed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "output")
        for kill_at in rng.integers(num_events, size=3):
            code, _ = _run(name, folder, int(kill_at))
            assert code in (0, -signal.SIGKILL)
            # Every file is whole.
            assert _PROGRAMS[name].results(folder).items() <= expected.items()
        code, _ = _run(name, folder)
        assert code == 0
        assert _PROGRAMS[name].results(folder) == expected
        assert _files(folder) == _files(undisturbed)


@functools.cache
def _undisturbed(name: str) -> tuple[Path, int]:
    """Return the folder of a program that was not killed, and its number of events of files."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-"), name)
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder.parent,), exitpriority=0)
    code, num_events = _run(name, folder)
    assert code == 0
    return folder, num_events


def _run(name: str, folder: Path, kill_at: int | None = None) -> tuple[int | None, int]:
    """Run a program in a process; return its exit code, negative for a signal, and the number of events."""
    needs, num_events = _PROGRAMS[name].needs, _PROCESSES.Value("i", 0)
    needed = None if needs is None else _undisturbed(needs)[0]
    process = _PROCESSES.Process(target=_run_and_kill, args=(name, folder, needed, kill_at, num_events))
    process.start()
    process.join()
    return process.exitcode, num_events.value


def _files(folder: Path) -> set[Path]:
    """Return the paths in a folder, without hidden ones."""
    paths = {path.relative_to(folder) for path in folder.rglob("*")}
    return {path for path in paths if not any(part.startswith(".") for part in path.parts)}
