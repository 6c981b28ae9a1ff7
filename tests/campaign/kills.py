"""Kills: a process that is killed at any moment, any number of times, ends in what an undisturbed one ends in.

A program collects trajectories, trains a nowcaster, evolves a drift, or compares methods, one of them of two stages. It is
killed by SIGKILL: at any moment, or right before it does something to a file, or a little later. What is there after a
kill is whole, and the same command goes on to the same results, bit for bit.
"""

import dataclasses
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import jax
import numpy as np
import optax
from wnn_jax.lab.forecasting.collection import Collection
from wnn_jax.lab.learning import evolve as evolve_module
from wnn_jax.lab.learning import forecasting
from wnn_jax.lab.learning import train as train_module

import wnn_jax
from tests.campaign.part import Part, Verdict
from tests.lab.conftest import NUM_RUNS, TINY, tiny_family
from tests.lab.toys import LinearRegression
from wnn_jax.lab.comparing.comparison import Compare, make_console, make_plan
from wnn_jax.lab.errors import one_line_errors
from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.tasks import families
from wnn_jax.lab.training.method import Method, StageStart

_MAX_KILLS = 3
_SECONDS_LIMIT = 300.0
_PIPE_SIZE = 1 << 20
# What a program does to files, as the interpreter tells of it.
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
# Forked from a process that has imported this module: a new one would take ten times as long to begin.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])


class Kill(NamedTuple):
    """When a process is killed.

    Attributes:
      seconds: after its beginning, or after the event.
      event: the number of what it does to files in its folder; `None` for no such.
    """

    seconds: float
    event: int | None = None


class Program(NamedTuple):
    """What is killed.

    Attributes:
      run: does its work in a folder, the first argument.
      results: what is compared of a folder, by name; of one that is not finished it is a part of that.
      needs: the name of the program whose folder is the second argument of `run`.
      is_shared: whether several processes share the work in one folder.
    """

    run: Callable[[Path, Path | None], Any]
    results: Callable[[Path], Mapping[str, Any]]
    needs: str | None = None
    is_shared: bool = False


class Reference(NamedTuple):
    """A run that is not disturbed.

    Attributes:
      folder: where it is.
      results: of the program.
      names: of its files.
      seconds: that it took.
      num_events: how often it did something to files in its folder.
    """

    folder: Path
    results: Mapping[str, Any]
    names: set[str]
    seconds: float
    num_events: int


# The programs.


def _collect(folder: Path, _: Path | None) -> None:
    collect(Collect(output=folder, family=TINY, num_runs=NUM_RUNS, num_processes=1))


def _collected(folder: Path) -> dict[str, bytes]:
    if not (folder / "manifest.json").exists():
        return {}
    Collection(folder).trajectories()  # Whose checksums are in the records.
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.json")}


def _train(folder: Path, collection: Path | None) -> None:
    assert collection is not None
    train_module.train(
        train_module.Train(
            collection=(collection,),
            output=folder,
            num_steps=24,
            windows_per_role=2,
            num_weights=8,
            validate_every=4,
        )
    )


def _trained(folder: Path) -> dict[str, Any]:
    file = folder / "nowcaster.npz"
    nowcaster: Any = wnn_jax.load(file) if file.exists() else None
    # The score on the test runs is the last that is written.
    return {"nowcaster": file.read_bytes()} if nowcaster is not None and "test" in nowcaster.record else {}


@dataclasses.dataclass(frozen=True)
class Halved:
    """A stage that goes on from half of the weights, with another optimizer."""

    def first_step(self, num_steps: int) -> int:
        """The first step of the stage."""
        return num_steps // 2

    def start(self, task: Any, state: Any, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Begins with half of the weights."""
        del num_steps, seed
        params = jax.tree.map(lambda leaf: leaf / 2, state.params)
        return StageStart(task, optax.sgd(learning_rate), params, state.model_state)


_METHODS = {
    "staged": Method(
        "staged",
        lambda learning_rate, num_steps: optax.chain(
            optax.adam(learning_rate), wnn_jax.nowcast("linear", snapshot_every=1)
        ),
        stages=(Halved(),),
    )
}


def _compare(folder: Path, _: Path | None) -> None:
    options = Compare(
        task="toy",
        methods=("plain", "staged"),
        learning_rates=(0.1,),
        seeds=(0, 1),
        num_steps=16,
        evaluate_every=2,
        num_processes=1,
        checkpoint_seconds=0.0,
        output=folder,
    )
    make_plan(options, make_task=lambda _: LinearRegression(), methods=_METHODS).train(make_console())


def _compared(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for path in folder.glob("runs/[!.]*.json"):
        content = json.loads(path.read_text())
        for evaluation in content["evaluations"]:
            del evaluation["seconds"]
        results[path.name] = content
    return results


def _evolve(folder: Path, _: Path | None) -> None:
    evolve_module.evolve(
        evolve_module.Evolve(
            output=folder,
            generations=3,
            num_pairs=1,
            lengths=(8,),
            validate_every=2,
            num_validation_runs=2,
            num_test_runs=2,
            num_means=2,
            std=0.5,
            num_processes=1,
        )
    )


PROGRAMS: Mapping[str, Program] = {
    "collect": Program(_collect, _collected, is_shared=True),
    "compare": Program(_compare, _compared, is_shared=True),
    "train": Program(_train, _trained, needs="collect"),
    "evolve": Program(_evolve, _trained),
}


# Their processes.


class Running(NamedTuple):
    """A process, and the pipe that it prints to."""

    process: ForkServerProcess
    output: Connection


class Ended(NamedTuple):
    """What came of a process.

    Attributes:
      code: its exit code: negative for a signal, `None` if it did not end in time.
      lines: what it printed, with a line `made FILE` for every file.
    """

    code: int | None
    lines: Sequence[str]


def start(name: str, folder: Path, disturb: Callable[[], Any] = lambda: None) -> Running:
    """Starts a process that runs a program as a user does, with errors in one line.

    Args:
      name: of the program.
      folder: where it works.
      disturb: is called in the process before it begins.
    """
    needed = needed_folder(name)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{util.get_temp_dir()}/compiled")
    output, end_of_process = _PROCESSES.Pipe(duplex=False)
    # Nobody reads before the end.
    fcntl.fcntl(output.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    arguments = name, folder, needed, end_of_process, cloudpickle.dumps(disturb), cache
    process = _PROCESSES.Process(target=_run, args=arguments)
    process.start()
    end_of_process.close()
    return Running(process, output)


def needed_folder(name: str) -> Path | None:
    """The finished folder that a program needs another one to work on."""
    needs = PROGRAMS[name].needs
    return None if needs is None else reference(needs).folder


def end(running: Running) -> Ended:
    """Waits for a process."""
    process, output = running
    process.join(_SECONDS_LIMIT)
    is_late = process.is_alive()
    process.kill()
    process.join()
    with os.fdopen(os.dup(output.fileno()), errors="replace") as printed:
        lines = printed.read().splitlines()
    output.close()
    return Ended(None if is_late else process.exitcode, lines)


def _run(name: str, folder: Path, needed: Path | None, output: Connection, disturb: bytes, cache: str) -> None:
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    families.FAMILIES = {TINY: tiny_family()}
    evolve_module.SHORT = dataclasses.replace(tiny_family(), name="short", datasets={"digits": ("mlp-64",)})
    forecasting._EVALUATION_WINDOWS_PER_ROLE = 4
    train_module._plot_errors = lambda *_: None
    num_events = 0

    def count(event: str, paths: Sequence[str]) -> None:
        nonlocal num_events
        num_events += 1
        if event == "os.rename":
            print(f"made {Path(paths[1]).name}")

    on_file_event(folder, count)
    cloudpickle.loads(disturb)()
    try:
        with one_line_errors():
            PROGRAMS[name].run(folder, needed)
        print(f"{num_events} events of files")
    finally:
        sys.stdout.flush()


def on_file_event(folder: Path, function: Callable[[str, Sequence[str]], None]) -> None:
    """Calls a function with the name and the paths of whatever this process does to files in a folder, right before."""

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            function(event, [str(argument) for argument in arguments[:2]])

    sys.addaudithook(on_event)


def at_file_event(folder: Path, number: int, function: Callable[[], None]) -> None:
    """Calls a function right before the event of a number, from 0."""
    numbers = itertools.count()
    on_file_event(folder, lambda event, paths: function() if next(numbers) == number else None)


def draw_kill(rng: np.random.Generator, expected: Reference) -> Kill:
    """A moment to kill a process at."""
    if rng.random() < 1 / 3:
        return Kill(rng.uniform(0, expected.seconds))
    return Kill(rng.choice([0.0, rng.exponential(3e-3)]), int(rng.integers(expected.num_events)))


def kill_this_process(folder: Path, kill: Kill) -> None:
    """Kills this process, which works in a folder, when it is time."""

    def in_time() -> None:
        timer = threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.run() if kill.seconds == 0 else timer.start()

    in_time() if kill.event is None else at_file_event(folder, kill.event, in_time)


@functools.cache
def reference(name: str) -> Reference:
    """A run of a program that is not disturbed, made once by every process."""
    folder = Path(util.get_temp_dir(), name)
    num_events, seconds = 0, 0.0
    for _ in range(2):  # The second one finds what was compiled by the first.
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        code, lines = end(start(name, folder))
        seconds = time.monotonic() - began
        if code != 0:
            raise RuntimeError(f"{name} ends with {code}: {lines[-1:]}")
        num_events = int(lines[-1].split()[0])
    return Reference(folder, PROGRAMS[name].results(folder), file_names(folder), seconds, num_events)


def file_names(folder: Path) -> set[str]:
    """The paths in a folder, but for those that are hidden."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {path for path in paths if not any(part.startswith(".") for part in Path(path).parts)}


def differences(name: str, folder: Path, expected: Reference, *, is_finished: bool) -> list[str]:
    """What is there and is another than in the reference, or is damaged, or is missing though all should be there."""
    try:
        results = PROGRAMS[name].results(folder)
    except (OSError, ValueError) as error:
        return [f"what it left cannot be read: {error}"]
    lines = [f"{key} is another" for key, value in results.items() if value != expected.results.get(key)]
    if is_finished:
        lines += [f"{key} is missing" for key in expected.results.keys() - results.keys()]
        lines += [f"{file} is in one of the two only" for file in expected.names ^ file_names(folder)]
    return lines


# The cases.


def _check(rng: np.random.Generator, folder: Path) -> Verdict:
    name = str(rng.choice(list(PROGRAMS)))
    expected = reference(name)
    output = folder / "output"
    kills = [draw_kill(rng, expected) for _ in range(rng.integers(1, _MAX_KILLS + 1))]
    num_kills = 0
    failures: list[str] = []
    for kill in kills:
        code, lines = end(start(name, output, functools.partial(kill_this_process, output, kill)))
        num_kills += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            failures.append(f"it ends with {code}: {lines[-1:]}")
        failures += differences(name, output, expected, is_finished=code == 0)
    code, lines = end(start(name, output))
    if code != 0:
        failures.append(f"it does not go on, and ends with {code}: {lines[-1:]}")
    failures += differences(name, output, expected, is_finished=True)
    tally = {f"{name}: cases": 1, f"{name}: kills": num_kills}
    return Verdict(tally, tuple(f"{name}, {kills}: {failure}" for failure in failures))


PART = Part(num_cases=1000, num_tested=1, check=_check)
