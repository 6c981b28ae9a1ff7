"""A program that is killed at any moment, any number of times, ends in what an undisturbed one ends in."""

import functools
import multiprocessing
import multiprocessing.util
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from tests.properties.lab_cases import PROGRAMS, run_and_kill
from tests.properties.strategies import generators, num_examples

# Forked from a process that has imported the programs: a new one would take ten times as long to begin.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.properties.lab_cases"])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@hypothesis.settings(max_examples=num_examples(0.05))
@hypothesis.given(rng=generators())
def test_a_killed_program_goes_on_to_the_same_results(name: str, rng: np.random.Generator):
    undisturbed, num_events = _undisturbed(name)
    expected = PROGRAMS[name].results(undisturbed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "output")
        for kill_at in rng.integers(num_events, size=3):
            code, _ = _run(name, folder, int(kill_at))
            assert code in (0, -signal.SIGKILL)
            # All that is there is whole.
            assert PROGRAMS[name].results(folder).items() <= expected.items()
        code, _ = _run(name, folder)
        assert code == 0
        assert PROGRAMS[name].results(folder) == expected
        assert _files(folder) == _files(undisturbed)


@functools.cache
def _undisturbed(name: str) -> tuple[Path, int]:
    """The folder of a program that was not killed, and how often it did something to a file there."""
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-"), name)
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder.parent,), exitpriority=0)
    code, num_events = _run(name, folder)
    assert code == 0
    return folder, num_events


def _run(name: str, folder: Path, kill_at: int | None = None) -> tuple[int | None, int]:
    """Runs a program in a process; returns its exit code, negative for a signal, and the number of events."""
    needs, num_events = PROGRAMS[name].needs, _PROCESSES.Value("i", 0)
    needed = None if needs is None else _undisturbed(needs)[0]
    arguments: tuple[Any, ...] = (name, folder, needed, kill_at, num_events)
    process = _PROCESSES.Process(target=run_and_kill, args=arguments)
    process.start()
    process.join()
    return process.exitcode, num_events.value


def _files(folder: Path) -> set[Path]:
    """The paths in a folder, without hidden ones."""
    paths = {path.relative_to(folder) for path in folder.rglob("*")}
    return {path for path in paths if not any(part.startswith(".") for part in path.parts)}
