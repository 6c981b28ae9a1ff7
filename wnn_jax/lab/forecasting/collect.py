"""Collecting trajectories: many small training runs, in parallel and resumable."""

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from wnn_jax.lab.errors import UsageError, check_options, look_up
from wnn_jax.lab.forecasting.families import FAMILIES, RunSettings, TaskFamily
from wnn_jax.lab.forecasting.trajectories import check_family, finished_runs, run_file, save_trajectory
from wnn_jax.lab.jobs import run_jobs
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.data import check_datasets
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS
from wnn_jax.lab.training.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """Train many small networks, and keep their weights over time.

    Call it again to go on: finished runs stay, and the missing runs are made. Several processes, also on several
    machines, can fill one folder: they share the runs.
    """

    output: Path
    """Folder of the collection."""
    family: Annotated[
        str,
        tyro.conf.arg(
            help="Task family to draw runs from, and its data: "
            + ", ".join(f"`{family.name}` ({', '.join(family.datasets)})" for family in FAMILIES.values())
            + "; `digits` needs no download.",
            metavar="FAMILY",
        ),
    ] = "small"
    num_runs: int = 100
    """Number of runs."""
    first_run: int = 0
    """Index of the first run in the family."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    budget: float | None = None
    """Minutes after which no further group of runs begins."""
    num_processes: int | None = None
    """Processes that train at the same time. Default: one per core on CPU, one on an accelerator."""
    executor: str | None = None
    """Dask scheduler to train on: an address such as tcp://HOST:8786, or a scheduler file. Default: this machine."""


def collect(options: Collect) -> None:
    """Make the runs that are missing. A bad option is a `UsageError` before anything is written."""
    check_options(options, positive=("num_runs", "num_processes", "budget"))
    if options.first_run < 0:
        raise UsageError(f"--first-run {options.first_run} must not be negative.")
    family = look_up(FAMILIES, options.family, "--family")
    check_datasets(family.datasets, options.data_dir)
    folder = options.output.absolute()
    check_family(folder, family)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = range(options.first_run, options.first_run + options.num_runs)
    missing = sorted(set(wanted).difference(finished_runs(folder)))
    groups = itertools.groupby(missing, lambda index: index // family.group_size)
    jobs = [GroupJob(folder, family, tuple(indices), options.data_dir.absolute()) for _, indices in groups]
    deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
    with Progress("runs", total=len(wanted), completed=len(wanted) - len(missing)) as progress:
        for job in run_jobs(
            make_runs, jobs, executor=options.executor, num_processes=options.num_processes, deadline=deadline
        ):
            progress.advance(len(job.indices))


@dataclasses.dataclass(frozen=True)
class GroupJob:
    """The missing runs of one group. They differ in seed and learning rate only, so they share a compiled program."""

    folder: Path
    family: TaskFamily
    indices: tuple[int, ...]
    data_dir: Path

    @property
    def file(self) -> Path:
        """The file that is written last."""
        return run_file(self.folder, self.indices[-1])

    def is_done(self) -> bool:
        """Return whether all runs exist."""
        return all(run_file(self.folder, index).exists() for index in self.indices)


def make_runs(job: GroupJob) -> None:
    """Make the runs of a group that do not exist. Each is saved when it ends."""
    check_family(job.folder, job.family)  # Another process may have filled the folder since.
    for index in job.indices:
        if not run_file(job.folder, index).exists():
            settings = job.family.settings(index)
            run = train_run(make_program(settings.program, job.data_dir), settings)
            save_trajectory(job.folder, job.family, index, *run)


@functools.lru_cache(maxsize=16)
def make_program(settings: RunSettings, data_dir: Path) -> Program:
    """Make the program of all runs whose `RunSettings.program` is `settings`, once per process.

    The state of its optimizer holds the learning rate, so another one needs no compilation.
    """

    def make_optimizer(learning_rate: Any, final_share: Any) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(learning_rate, settings.num_steps, alpha=final_share)
        return BASE_OPTIMIZERS[settings.optimizer](schedule)

    tx = optax.inject_hyperparams(make_optimizer)(learning_rate=0.0, final_share=0.0)
    return Program(settings.task(data_dir), tx)


def train_run(program: Program, settings: RunSettings) -> tuple[list[Any], list[float], dict[str, float]]:
    """Train one run of a program, and return its snapshots, losses and validation scores for `save_trajectory`."""
    state = program.init(settings.seed)
    rates = {"learning_rate": settings.learning_rate, "final_share": settings.final_learning_rate}
    hyperparams = {name: jnp.float32(rate) for name, rate in rates.items()}
    state = state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
    snapshots, losses = [], []
    for stop in range(settings.snapshot_every, settings.num_steps + 1, settings.snapshot_every):
        state, loss, _ = program.advance(state, settings.seed, stop)
        # A copy, because the next step overwrites the buffers of the parameters.
        snapshots.append(jax.tree.map(np.array, state.params))
        losses.append(loss)
    return snapshots, losses, program.evaluate(state.params, state.model_state, "validation")
