"""Collecting trajectories: many small training runs, in parallel and resumable."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from wnn_jax.lab.errors import UsageError, check_options
from wnn_jax.lab.forecasting.collection import Collection, record_file
from wnn_jax.lab.jobs_claims import claim, run_shared
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.data import check_datasets
from wnn_jax.lab.tasks.families import FAMILIES, RunSettings, SplitName, describe_families, find_family
from wnn_jax.lab.training.optimizers import base_optimizer
from wnn_jax.lab.training.program import Program, stack_states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """Train many small networks, and keep their weights over time.

    Called again, it goes on: finished runs stay, the others are made. Several processes, also of several machines, can
    fill one folder: each makes runs that no other one does.
    """

    output: Path
    """Folder of the collection."""
    family: Annotated[
        str,
        tyro.conf.arg(
            help=f"Which runs, on which data: {describe_families(FAMILIES.values())}; `digits` needs no download.",
            metavar="FAMILY",
        ),
    ] = "small"
    num_runs: int = 100
    """How many runs."""
    first_run: int = 0
    """Index of the first one in the family."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    budget: float | None = None
    """Minutes after which no further group of runs is begun."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU, one for a whole group on an accelerator."""
    executor: str | None = None
    """Dask scheduler to train on: an address such as tcp://HOST:8786, or a scheduler file. Default: this machine."""


def collect(options: Collect) -> Collection:
    """Makes the runs that are missing.

    Raises:
      UsageError: if an option cannot be used, or data sets of the family are missing, before anything is written.
    """
    check_options(options, positive=("num_runs", "num_processes", "budget"))
    if options.first_run < 0:
        raise UsageError(f"--first-run {options.first_run} must not be negative.")
    family = find_family(options.family)
    check_datasets(family.datasets, options.data_dir)
    collection = Collection.create(options.output, family)
    wanted = range(options.first_run, options.first_run + options.num_runs)
    finished = collection.finished()
    # By group rather than by program, so that whatever the budget allows is a fair sample of the family.
    groups: dict[int, list[int]] = {}
    for index in wanted:
        if index not in finished:
            groups.setdefault(index // family.group_size, []).append(index)
    jobs = [
        GroupJob(
            options.output.absolute(),
            collection.family_key,
            tuple(indices),
            tuple(family.settings(index) for index in indices),
            family.split(indices[0]),
            options.data_dir.absolute(),
        )
        for indices in groups.values()
    ]
    deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
    num_missing = sum(len(job.indices) for job in jobs)
    with Progress("runs", total=len(wanted), completed=len(wanted) - num_missing) as progress:
        for job in run_shared(
            train_group, jobs, executor=options.executor, num_processes=options.num_processes, deadline=deadline
        ):
            progress.advance(len(job.indices))
    return collection


@dataclasses.dataclass(frozen=True)
class GroupJob:
    """Runs of one group, which share a compiled program, with all that a worker needs to make them.

    Attributes:
      output: folder of the collection.
      family: the `Collection.family_key`.
      indices: of the runs in their family.
      settings: of the runs.
      split: of the group.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
    """

    output: Path
    family: str
    indices: tuple[int, ...]
    settings: tuple[RunSettings, ...]
    split: SplitName
    data_dir: Path

    @property
    def files(self) -> list[Path]:
        """The records of the runs."""
        return [record_file(self.output, index) for index in self.indices]


def train_group(job: GroupJob) -> None:
    """Makes the runs of a group: one by one on CPU, where each is saved when it ends, and all together elsewhere.

    Runs that are there already are kept, and those that another process makes are left to it.

    Raises:
      UsageError: if the folder has become a collection of another family.
    """
    collection = Collection(job.output)
    if collection.family_key != job.family:
        raise UsageError(f"--output {job.output} was given to another family of tasks. Collect into another folder.")
    runs = list(zip(job.indices, job.settings, job.files, strict=True))
    is_on_cpu = jax.default_backend() == "cpu"
    for part in [[run] for run in runs] if is_on_cpu else [runs]:
        with contextlib.ExitStack() as claims:
            own = [
                (index, settings)
                for index, settings, file in part
                if claims.enter_context(claim(file)) and not file.exists()
            ]
            if not own:
                continue
            program = make_program(job.settings[0].program, job.data_dir)
            group = [settings for _, settings in own]
            trained = [train_run(program, *group)] if is_on_cpu else train_runs_together(program, group)
            for (index, settings), run in zip(own, trained, strict=True):
                collection.save(index, settings, job.split, *run)


class CollectedRun(NamedTuple):
    """What is kept of a training run.

    Attributes:
      snapshots: trees of parameters, NumPy arrays.
      losses: the mean training loss before each snapshot.
      validation: metric -> score on the validation data after the last step.
    """

    snapshots: Sequence[Any]
    losses: Sequence[float]
    validation: dict[str, float]


@functools.lru_cache(maxsize=16)
def make_program(settings: RunSettings, data_dir: Path) -> Program:
    """The program of all runs that differ in seed, learning rate and decay only, made once per process.

    Its hyperparameters are the initial learning rate, and the last one as a share of it.

    Args:
      settings: what these runs have in common, `RunSettings.program`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
    """

    def make_optimizer(learning_rate: Any, final_share: Any) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(learning_rate, settings.num_steps, alpha=final_share)
        return base_optimizer(settings.optimizer)(schedule)

    return Program(settings.task(data_dir), make_optimizer)


def train_run(program: Program, settings: RunSettings) -> CollectedRun:
    """Trains one run of a program."""
    rates = _rates(settings)
    state = program.init(settings.seed, *rates)
    snapshots, losses = [], []
    for stop in _stops(settings):
        state, loss, _ = program.advance(state, settings.seed, stop, *rates)
        snapshots.append(_on_host(state.params))
        losses.append(loss)
    return CollectedRun(snapshots, losses, program.evaluate(state.params, state.model_state, "validation"))


def train_runs_together(program: Program, group: Sequence[RunSettings]) -> list[CollectedRun]:
    """Trains several runs of a program at once, vectorised, with the steps between two snapshots in one scan."""
    seeds = [settings.seed for settings in group]
    rates = tuple(jnp.stack(values) for values in zip(*map(_rates, group), strict=True))
    states = stack_states([program.init(settings.seed, *_rates(settings)) for settings in group])
    snapshots, losses = [], []
    for stop in _stops(group[0]):
        states, loss = program.advance_together(states, seeds, stop, *rates)
        snapshots.append(_on_host(states.params))
        losses.append(loss)
    runs: list[CollectedRun] = []
    for member in range(len(group)):
        own = _member(member)
        validation = program.evaluate(own(states.params), own(states.model_state), "validation")
        runs.append(
            CollectedRun([own(tree) for tree in snapshots], [float(loss[member]) for loss in losses], validation)
        )
    return runs


def _member(number: int) -> Callable[[Any], Any]:
    """Takes one member out of stacked trees."""
    return lambda tree: jax.tree.map(lambda leaf: leaf[number], tree)


def _rates(settings: RunSettings) -> tuple[jax.Array, jax.Array]:
    return jnp.float32(settings.learning_rate), jnp.float32(settings.final_learning_rate)


def _stops(settings: RunSettings) -> range:
    """The steps after which there is a snapshot."""
    return range(settings.snapshot_every, settings.num_steps + 1, settings.snapshot_every)


def _on_host(params: Any) -> Any:
    """A copy: the next step takes over the buffers of the parameters."""
    return jax.tree.map(np.array, params)
