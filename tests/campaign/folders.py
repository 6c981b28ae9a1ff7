"""Folders: what goes wrong with the folder that a program works in costs nothing that is in it.

Several processes or threads work in one folder, and one of them may be killed; files cannot grow, as on a full disk;
the folder cannot be written to, or vanishes. Nothing is made twice, nothing is torn, errors are one line, and the same
command goes on to the results of a run that is not disturbed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import wnn_jax
from tests.campaign.kills import (
    PROGRAMS,
    Ended,
    Reference,
    at_file_event,
    differences,
    draw_kill,
    end,
    kill_this_process,
    needed_folder,
    reference,
    start,
)
from tests.campaign.part import Part, Verdict
from wnn_jax.lab.errors import UsageError

# Folders that nobody can make anything in.
_READ_ONLY = (Path("/proc"), Path("/sys"))
# What those answer to others that can only work in a folder alone.
_REFUSAL = "another process trains there"
_MAX_OTHERS = 2
_NUM_SAVES = 10


class Situation(NamedTuple):
    """A program that is about to be disturbed.

    Attributes:
      rng: draws how.
      name: of the program.
      expected: of a run that is not disturbed.
      folder: the case's own, where nothing is yet.
    """

    rng: np.random.Generator
    name: str
    expected: Reference
    folder: Path

    @property
    def output(self) -> Path:
        """Where the program works."""
        return self.folder / "output"

    def run(self, disturb: Callable[[], Any] = lambda: None) -> Ended:
        """Runs the program."""
        return end(start(self.name, self.output, disturb))

    def go_on(self) -> list[str]:
        """Runs the program to its end, and returns what is wrong then."""
        ended = self.run()
        return [*([] if ended.code == 0 else [f"it does not go on: {ended}"]), *self.differences(is_finished=True)]

    def differences(self, *, is_finished: bool) -> list[str]:
        """See `kills.differences`."""
        return differences(self.name, self.output, self.expected, is_finished=is_finished)


# What goes wrong. Each returns what the library did wrong then.


def _together(situation: Situation) -> list[str]:
    """Several processes work in one folder, and the first may be killed."""
    rng, name, expected, _ = situation
    disturb = functools.partial(kill_this_process, situation.output, draw_kill(rng, expected))
    running = [start(name, situation.output, disturb if rng.random() < 0.5 else lambda: None)]
    for _ in range(rng.integers(1, _MAX_OTHERS + 1)):
        time.sleep(rng.uniform(0, expected.seconds / 2))
        running.append(start(name, situation.output))
    survivors = [ended for ended in map(end, running) if ended.code != -signal.SIGKILL]
    failures = [line for ended in survivors for line in _unexpected(ended, _REFUSAL)]
    is_shared = PROGRAMS[name].is_shared
    if is_shared:
        made = collections.Counter(line for ended in survivors for line in ended.lines)
        once = expected.results.keys() - {"manifest.json"}
        failures += [f"{file} is made {made[f'made {file}']} times" for file in once if made[f"made {file}"] > 1]
    is_finished = is_shared or any(ended.code == 0 for ended in survivors)
    return [*failures, *situation.differences(is_finished=is_finished), *situation.go_on()]


def _in_threads(situation: Situation) -> list[str]:
    """Two threads of a process work in one folder."""
    name, output = situation.name, situation.output
    ended = situation.run(functools.partial(_run_beside, name, output, needed_folder(name)))
    return [*_unexpected(ended, _REFUSAL), *situation.differences(is_finished=True), *situation.go_on()]


def _run_beside(name: str, folder: Path, needed: Path | None) -> None:
    def run() -> None:
        with contextlib.suppress(UsageError):
            PROGRAMS[name].run(folder, needed)

    threading.Thread(target=run).start()


def _on_a_full_disk(situation: Situation) -> list[str]:
    """No file grows beyond a size, at first or after a kill."""
    rng, _, expected, _ = situation
    if rng.random() < 0.5:
        situation.run(functools.partial(kill_this_process, situation.output, draw_kill(rng, expected)))
    largest = max(path.stat().st_size for path in expected.folder.rglob("*"))
    ended = situation.run(functools.partial(_limit_files, int(largest * rng.choice([0.0, rng.random() ** 3]))))
    return [*_unexpected(ended), *situation.differences(is_finished=ended.code == 0), *situation.go_on()]


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _vanishing(situation: Situation) -> list[str]:
    """The folder is moved away while the program works in it, and is put back when it has ended."""
    rng, _, expected, folder = situation
    event, away = int(rng.integers(expected.num_events)), folder / "away"
    ended = situation.run(
        functools.partial(at_file_event, situation.output, event, functools.partial(_move, situation.output, away))
    )
    failures = [*_unexpected(ended), *situation.differences(is_finished=False)]
    if away.exists():
        shutil.rmtree(situation.output, ignore_errors=True)
        away.rename(situation.output)
    return [*failures, *situation.differences(is_finished=False), *situation.go_on()]


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.rename(target)


def _read_only(situation: Situation) -> list[str]:
    """Nothing can be written where the folder should be."""
    rng, name, _, folder = situation
    file = folder / "file"
    file.write_text("mine")
    output = [*_READ_ONLY, file, file][rng.integers(4)]
    ended = end(start(name, output / "output" if rng.random() < 0.5 else output))
    failures = [] if ended.code == 1 else [f"it ends with {ended}"]
    return [*failures, *_unexpected(ended), *([] if file.read_text() == "mine" else ["a file is overwritten"])]


def _saving(situation: Situation) -> list[str]:
    """Threads save nowcasters under one name, while another one loads what is there."""
    file = situation.folder / "nowcaster.npz"
    template = wnn_jax.nowcasters.WNN.init(jax.random.key(0), ("bias",))

    def save(number: int) -> None:
        params = jax.tree.map(lambda leaf: np.full_like(leaf, number), dict(template.params))
        for _ in range(_NUM_SAVES):
            wnn_jax.save(dataclasses.replace(template, params=params), file)

    save(0)
    failures: list[str] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        saves = [pool.submit(save, number) for number in range(3)]
        while not all(future.done() for future in saves):
            nowcaster: Any = wnn_jax.load(file)
            if len({value for leaf in jax.tree.leaves(dict(nowcaster.params)) for value in np.unique(leaf)}) != 1:
                failures.append("a nowcaster is loaded that nobody saved")
    for future in saves:
        future.result()
    if [path.name for path in situation.folder.iterdir()] != [file.name]:
        failures.append("saving leaves other files")
    return failures


def _unexpected(ended: Ended, message: str = "") -> list[str]:
    """What is wrong with how a process ended that may end well, or with a message in one line."""
    errors = [line for line in ended.lines if line.startswith("error: ")]
    is_message = ended.code == 1 and len(errors) == 1 and message in errors[0]
    has_traceback = any("Traceback" in line for line in ended.lines)
    return [] if ended.code == 0 or (is_message and not has_traceback) else [f"it ends with {ended}"]


_KINDS: Mapping[str, tuple[float, Callable[[Situation], Sequence[str]]]] = {
    "together": (0.4, _together),
    "in threads": (0.1, _in_threads),
    "full disk": (0.2, _on_a_full_disk),
    "vanishing": (0.15, _vanishing),
    "read only": (0.1, _read_only),
    "saving": (0.05, _saving),
}


def _check(rng: np.random.Generator, folder: Path) -> Verdict:
    name = str(rng.choice(list(PROGRAMS)))
    kind = str(rng.choice(list(_KINDS), p=[share for share, _ in _KINDS.values()]))
    failures = _KINDS[kind][1](Situation(rng, name, reference(name), folder))
    case = kind if kind == "saving" else f"{kind}: {name}"
    return Verdict({case: 1}, tuple(f"{case}: {failure}" for failure in failures))


PART = Part(num_cases=200, num_tested=1, check=_check)
