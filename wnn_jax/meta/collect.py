"""Collecting trajectories: many small training runs, in parallel and resumable."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from wnn_jax.meta.datasets import load_dataset
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.program import Program
from wnn_jax.meta.progress import Progress
from wnn_jax.meta.tasks import family_of
from wnn_jax.meta.trajectories import Collection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """Train many small networks, and keep their weights over time.

    Called again, it goes on: finished runs stay, the others are made. Several machines can fill one folder, each with
    runs of its own (`--first-run`, `--num-runs`).
    """

    output: Path
    """Folder of the collection."""
    family: str = "small"
    """Which tasks: `small` (CIFAR-10, MNIST, tiny Shakespeare; see meta/tasks.py), or `digits` (no download)."""
    num_runs: int = 100
    """How many runs."""
    first_run: int = 0
    """Index of the first one in the family."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    budget: float | None = None
    """Minutes after which no further run is begun."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU; on an accelerator one, which trains the runs of
    a group together."""


def collect(options: Collect) -> Collection:
    """Makes the runs that are missing.

    Raises:
      UsageError: if an option cannot be used.
    """
    family = family_of(options.family)
    for name in ("num_runs", "num_processes", "budget"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be positive.")
    if options.first_run < 0:
        raise UsageError(f"--first-run {options.first_run} must not be negative.")
    collection = Collection.create(options.output, family)
    wanted = range(options.first_run, options.first_run + options.num_runs)
    finished = collection.finished()
    # By group rather than by program, so that whatever the budget allows is a fair sample of the family.
    groups: dict[int, list[int]] = {}
    for index in wanted:
        if index not in finished:
            groups.setdefault(index // family.group_size, []).append(index)
    missing = sum(map(len, groups.values()))
    deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
    jobs = [_Job(options.output, options.family, tuple(indices), options.data_dir) for indices in groups.values()]
    with Progress("runs", total=len(wanted), completed=len(wanted) - missing) as progress:
        for indices in _run_all(jobs, options.num_processes, deadline):
            progress.advance(len(indices))
    return collection


@dataclasses.dataclass(frozen=True)
class _Job:
    """Runs of one group, which share a compiled program."""

    output: Path
    family: str
    indices: tuple[int, ...]
    data_dir: Path


def _run_all(jobs: Sequence[_Job], num_processes: int | None, deadline: float | None) -> Iterable[tuple[int, ...]]:
    """Does all jobs that can be begun before the deadline, and yields the indices of each when it is done."""
    if num_processes is None:
        num_processes = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    if num_processes == 1:
        for job in jobs:
            if deadline is None or time.monotonic() < deadline:
                yield _run_job(job)
        return
    # Not forked: a forked process inherits the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context, initializer=_one_thread) as pool:
        waiting = collections.deque(jobs)
        running: set[concurrent.futures.Future[tuple[int, ...]]] = set()
        while waiting or running:
            if deadline is not None and time.monotonic() >= deadline:
                waiting.clear()
            while waiting and len(running) < num_processes:
                running.add(pool.submit(_run_job, waiting.popleft()))
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _one_thread() -> None:
    """Keeps this process from sharing its work out: the other cores have processes of their own."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


def _run_job(job: _Job) -> tuple[int, ...]:
    family, collection = family_of(job.family), Collection(job.output)
    tasks = [family.task(index) for index in job.indices]
    program = Program(tasks[0], load_dataset(tasks[0].dataset, job.data_dir))
    if jax.default_backend() == "cpu":
        for index, task in zip(job.indices, tasks, strict=True):
            snapshots, losses = [], []
            for params, loss in program.run(task):
                snapshots.append(params)
                losses.append(loss)
            collection.save(index, task, family.split(index), snapshots, losses, program.validation_loss(snapshots[-1]))
        return job.indices
    steps = list(program.run_together(tasks))
    for member, (index, task) in enumerate(zip(job.indices, tasks, strict=True)):
        snapshots = [jax.tree.map(lambda leaf: leaf[member], params) for params, _ in steps]  # noqa: B023
        losses = [float(loss[member]) for _, loss in steps]
        collection.save(index, task, family.split(index), snapshots, losses, program.validation_loss(snapshots[-1]))
    return job.indices
