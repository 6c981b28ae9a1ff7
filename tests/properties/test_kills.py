"""A program that is killed at any moment, any number of times, ends in what an undisturbed one ends in."""

import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.properties.lab_cases import PROGRAMS, run_and_kill
from tests.properties.strategies import num_examples

# Forked from a process that has imported the programs: a new one would take ten times as long to begin.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.properties.lab_cases"])


class Undisturbed(NamedTuple):
    """A run of a program that was not killed.

    Attributes:
      folder: where it worked.
      results: what it left there.
      files: the paths of all that it left there.
      num_events: how often it did something to a file.
    """

    folder: Path
    results: Mapping[str, Any]
    files: set[str]
    num_events: int


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@hypothesis.settings(max_examples=num_examples(0.1))
@hypothesis.given(moments=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3))
def test_a_killed_program_goes_on_to_the_same_results(name: str, moments: list[float]):
    undisturbed = _undisturbed(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "output"
        for moment in moments:
            code, _ = _run(name, folder, int(moment * undisturbed.num_events))
            assert code in (0, -signal.SIGKILL)
            # All that is there is whole.
            assert PROGRAMS[name].results(folder).items() <= undisturbed.results.items()
        code, _ = _run(name, folder)
        assert code == 0
        assert PROGRAMS[name].results(folder) == undisturbed.results
        assert _files(folder) == undisturbed.files


@functools.cache
def _undisturbed(name: str) -> Undisturbed:
    folder = Path(tempfile.mkdtemp(prefix="undisturbed-"), name)
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder.parent,), exitpriority=0)
    code, num_events = _run(name, folder)
    assert code == 0
    return Undisturbed(folder, PROGRAMS[name].results(folder), _files(folder), num_events)


def _run(name: str, folder: Path, kill_at: int | None = None) -> tuple[int | None, int]:
    """Runs a program in a process; returns its exit code, negative for a signal, and the number of events."""
    needs, num_events = PROGRAMS[name].needs, _PROCESSES.Value("i", 0)
    needed = None if needs is None else _undisturbed(needs).folder
    process = _PROCESSES.Process(target=run_and_kill, args=(name, folder, needed, kill_at, num_events))
    process.start()
    process.join()
    return process.exitcode, num_events.value


def _files(folder: Path) -> set[str]:
    """The paths in a folder, without hidden ones."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {path for path in paths if not any(part.startswith(".") for part in path.split(os.sep))}
