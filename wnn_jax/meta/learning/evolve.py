"""Training a learned drift through what it does to whole trainings.

How far it is best to go cannot be seen from the weights at a visit: a jump may make the loss worse at once and pay
later. So the drift is judged by the losses along short trainings. The gradient of these says little after hundreds of
steps, and an evolution strategy needs none.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import wnn_jax
from wnn_jax._roles import ROLES
from wnn_jax.meta.errors import UsageError, check_options
from wnn_jax.meta.learning.evolution import Found, Gain, Row, Search, Solution, differences
from wnn_jax.meta.learning.train import claimed_folder
from wnn_jax.meta.output import save_rows
from wnn_jax.meta.progress import Progress
from wnn_jax.meta.tasks.data import check_datasets
from wnn_jax.meta.tasks.families import (
    FAMILIES,
    TEST_SPLITS,
    VALIDATION_SPLITS,
    RunSettings,
    SplitName,
    TaskFamily,
    describe_families,
    find_family,
)
from wnn_jax.meta.training.executors import RunJobs, kept_processes
from wnn_jax.meta.training.keys import run_key, versions
from wnn_jax.meta.training.optimizers import base_optimizer
from wnn_jax.meta.training.program import Program
from wnn_jax.meta.training.readings import BatchStatistics, all_readings, with_moving_averages
from wnn_jax.meta.training.trainer import Part
from wnn_jax.nowcasters import LearnedDrift

# Trainings of seconds; their lengths are drawn apart.
SHORT = TaskFamily(
    name="short",
    datasets={
        "cifar10-16": ("mlp-64", "mlp-128-64", "cnn-8-16-32", "cnn-16-32", "three-conv-8-16-16"),
        "mnist-14": ("mlp-128-64", "cnn-8-16"),
        "tiny_shakespeare": ("transformer-1x32", "transformer-2x24"),
    },
    validation_architectures=("cnn-8-16-32",),
    test_architectures=("cnn-16-32", "transformer-2x24"),
    learning_rates={"adam": (1e-3, 1.2e-2)},
    batch_sizes=(32,),
    num_steps=1_500,
    snapshot_every=10,
    group_size=1,
    validation_share=0.15,
    test_share=0.15,
)

# What a linear choice is made of.
_FEATURES = (*ROLES, "log step", "log columns", "signal")
_EMA_DECAY = 0.99
_METRIC = "loss"
_EVALUATIONS_PER_RUN = 4
# In nats of the logarithm of the loss; a run that diverges with only one of the two counts as this.
_MAX_GAIN = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolve:
    """Train a learned drift through whole short trainings, by an evolution strategy.

    It begins as the drift without weights, and is judged by the logarithm of the validation loss, at the better reading
    of the weights and an average of them, along the training and at its end, beside the same of the drift it began as.
    Called again with the same options, an interrupted search goes on, to the same nowcaster.
    """

    output: Path
    """Folder for the nowcaster, its metrics and the state of the search."""
    family: Annotated[
        str,
        tyro.conf.arg(
            help=f"Which trainings, on which data: {describe_families((SHORT, *FAMILIES.values()))}.", metavar="FAMILY"
        ),
    ] = SHORT.name
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    generations: int = 100
    """Steps of the search."""
    num_pairs: int = 8
    """Antithetic pairs in a generation; the two of a pair train the same network from the same seed."""
    lengths: tuple[int, ...] = (500, 1_000, 1_500)
    """Steps of a training: one of these."""
    search: Literal["linear", "all"] = "linear"
    """What is searched for: choices that are linear in a few features, or all weights of the network."""
    num_means: int = 3
    """Running means of the drift, 2 or 3."""
    std: float = 0.1
    """Standard deviation of the members of a generation around their mean."""
    learning_rate: float = 0.03
    """How fast the mean moves, at first."""
    validate_every: int = 10
    """Generations between validations."""
    num_validation_runs: int = 16
    """Runs that the best mean is selected by."""
    num_test_runs: int = 32
    """Runs that it is scored on in the end, with other seeds and architectures."""
    budget: float | None = None
    """Minutes after which no further generation is begun."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU, one on an accelerator."""
    seed: int = 0
    """Decides the network's initial weights and the members of the generations."""


_POSITIVE = (
    "generations",
    "num_pairs",
    "std",
    "learning_rate",
    "validate_every",
    "budget",
    "num_processes",
)
_WITHOUT_EFFECT = ("output", "data_dir", "budget", "num_processes")


def evolve(options: Evolve) -> LearnedDrift:
    """Searches, and keeps the drift that was best in a validation as `nowcaster.npz` in the output folder.

    Returns:
      The nowcaster, with its record.

    Raises:
      UsageError: if an option cannot be used, a data set is missing, or the output folder holds another search.
    """
    check_options(options, positive=_POSITIVE)
    if min(options.num_validation_runs, options.num_test_runs) < 2:
        raise UsageError("--num-validation-runs and --num-test-runs must be at least 2, for an interval.")
    if not options.lengths or min(options.lengths) < _EVALUATIONS_PER_RUN:
        raise UsageError(f"--lengths {options.lengths} must be numbers of at least {_EVALUATIONS_PER_RUN} steps.")
    deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
    family = SHORT if options.family == SHORT.name else find_family(options.family)
    check_datasets(family.datasets, options.data_dir)
    start = LearnedDrift.init(jax.random.key(options.seed), num_means=options.num_means)
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in _WITHOUT_EFFECT}
    description = json.loads(
        json.dumps(
            {
                "kind": "learned-drift",
                "settings": settings,
                "family": dataclasses.asdict(family),
                "rule": start.rule,
                "versions": versions(),
            }
        )
    )
    with claimed_folder(options.output, description):
        with kept_processes(mean_log_loss, options.num_processes) as run:
            objective = ShortTrainings(options, family, start, run)
            found = _search(options, objective, deadline)
            test = objective.gain(found.best, TEST_SPLITS, options.num_test_runs)
        record = {
            **description,
            "training": run_key(description),
            "generations": len(found.rows),
            "trainings": found.rows[-1].trainings if found.rows else 0,
            "seeds": objective.seeds(len(found.rows)),
            "validation": found.validation._asdict(),
            "test": test._asdict(),
        }
        nowcaster = dataclasses.replace(objective.nowcaster(found.best), record=record)
        wnn_jax.save(nowcaster, options.output / "nowcaster.npz")
    return nowcaster


def _search(options: Evolve, objective: "ShortTrainings", deadline: float | None) -> Found:
    search = Search(
        options.num_pairs,
        options.std,
        options.learning_rate,
        options.generations,
        options.validate_every,
        options.seed,
    )
    with Progress("generations", total=options.generations) as progress:
        shown = 0

        def report(found: Found) -> None:
            nonlocal shown
            save_rows([_figures(row) for row in found.rows], options.output / "metrics.csv")
            progress.advance(len(found.rows) - shown, f"best validation {found.validation.mean:+.4f}")
            shown = len(found.rows)

        file = options.output / "search.npz"
        return search.run(objective, objective.start, file, report=report, deadline=deadline)


def _figures(row: Row) -> dict[str, Any]:
    figures = row._asdict()
    validation = figures.pop("validation")
    return figures if validation is None else figures | validation._asdict()


class ShortTrainings:
    """How a learned drift does in the trainings of a family.

    Attributes:
      start: the solution that is the rule.
    """

    def __init__(
        self,
        options: Evolve,
        family: TaskFamily,
        start: LearnedDrift,
        run: "RunJobs[Job, float]",
    ) -> None:
        self._options = options
        self._family = family
        self._initial = start
        self._run = run
        self._rows = np.array([start.features.index(name) for name in _FEATURES])
        self._of_rule: dict[RunSettings, float] = {}
        kernel = start.params["linear"]["kernel"]
        self.start: Solution = (
            dict(start.params) if options.search == "all" else jnp.zeros([len(self._rows), kernel.shape[1]])
        )

    def nowcaster(self, solution: Solution) -> LearnedDrift:
        """The nowcaster that a solution stands for."""
        if self._options.search == "all":
            return dataclasses.replace(self._initial, params=solution)
        kernel = jnp.zeros_like(self._initial.params["linear"]["kernel"]).at[self._rows].set(solution)
        return dataclasses.replace(self._initial, params={**self._initial.params, "linear": {"kernel": kernel}})

    def losses(self, generation: int, members: Sequence[Solution]) -> np.ndarray:
        """See `evolution.Objective.losses`. Every pair has a training of its own, which no other ever has."""
        num_pairs = len(members) // 2
        runs = list(itertools.islice(self._runs(("train",)), generation * num_pairs, (generation + 1) * num_pairs))
        return self._losses([*runs, *runs], [self.nowcaster(member) for member in members])

    def validate(self, solution: Solution) -> Gain:
        """See `evolution.Objective.validate`."""
        return self.gain(solution, VALIDATION_SPLITS, self._options.num_validation_runs)

    def gain(self, solution: Solution, splits: Sequence[SplitName], num_runs: int) -> Gain:
        """How much better than the rule a solution is, on the first runs of some splits."""
        runs = list(itertools.islice(self._runs(splits), num_runs))
        new = [run for run in runs if run not in self._of_rule]
        losses = self._losses([*runs, *new], [self.nowcaster(solution)] * len(runs) + [self._initial] * len(new))
        self._of_rule |= dict(zip(new, losses[len(runs) :].tolist(), strict=True))
        of_rule = np.array([self._of_rule[run] for run in runs])
        return Gain.of(differences(of_rule, losses[: len(runs)], _MAX_GAIN))

    def seeds(self, num_generations: int) -> dict[str, list[int]]:
        """The numbers in the family of the first and the last run that each part of the search took."""
        numbers: dict[str, tuple[tuple[SplitName, ...], int]] = {
            "train": (("train",), num_generations * self._options.num_pairs),
            "validation": (VALIDATION_SPLITS, self._options.num_validation_runs),
            "test": (TEST_SPLITS, self._options.num_test_runs),
        }
        seeds: dict[str, list[int]] = {}
        for name, (splits, number) in numbers.items():
            taken = [run.seed for run in itertools.islice(self._runs(splits), number)]
            seeds[name] = [taken[0], taken[-1]] if taken else []
        return seeds

    def _runs(self, splits: Sequence[SplitName]) -> Iterator[RunSettings]:
        """The runs of some splits, each of a length that is drawn by its number."""
        for index in itertools.count():
            if self._family.split(index) in splits:
                length = np.random.default_rng([self._family.seed, index, 2]).choice(self._options.lengths)
                yield dataclasses.replace(self._family.settings(index), num_steps=int(length))

    def _losses(self, runs: Sequence[RunSettings], nowcasters: Sequence[LearnedDrift]) -> np.ndarray:
        data_dir = self._options.data_dir.absolute()
        jobs = [
            Job(
                number, run, data_dir, jax.device_get(dict(nowcaster.params)), dict(nowcaster.rule), nowcaster.num_means
            )
            for number, (run, nowcaster) in enumerate(zip(runs, nowcasters, strict=True))
        ]
        losses = np.full(len(jobs), math.nan)
        # Trainings of one program after each other, so that what is compiled for it is at hand.
        for job, loss in self._run(sorted(jobs, key=lambda job: repr(_program_settings(job.settings)))):
            losses[job.number] = loss
        return losses


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A training with a learned drift.

    Attributes:
      number: among the jobs of a call.
      settings: of the training.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
      params: of the drift's network.
      rule: settings of the drift that it began as.
      num_means: how many running means it has.
    """

    number: int
    settings: RunSettings
    data_dir: Path
    params: Mapping[str, Any]
    rule: Mapping[str, Any]
    num_means: int


def mean_log_loss(job: Job) -> float:
    """Trains, and returns the mean of the logarithm of the validation loss along the training and at its end.

    Each time it is that of the better one of two readings: the weights, and their exponential moving average.
    """
    settings = job.settings
    part = _make_part(_program_settings(settings), job.data_dir, json.dumps(dict(job.rule)), job.num_means)
    hyperparameters = (
        jnp.float32(settings.learning_rate),
        jnp.float32(settings.final_learning_rate),
        jnp.float32(settings.num_steps),
        jax.tree.map(jnp.asarray, job.params),
    )
    state = part.program.init(settings.seed, *hyperparameters)
    losses: list[float] = []
    for index in range(1, _EVALUATIONS_PER_RUN + 1):
        stop = index * settings.num_steps // _EVALUATIONS_PER_RUN
        state, _, _ = part.program.advance(state, settings.seed, stop, *hyperparameters)
        loss = min(scores[_METRIC] for scores in part.scores(state, "validation").values())
        if not math.isfinite(loss):
            return math.nan
        losses.append(math.log(loss))
    return float(np.mean(losses))


def _program_settings(settings: RunSettings) -> RunSettings:
    """What trainings have to have in common to share a compiled program. The length is no part of it."""
    return dataclasses.replace(settings.program, num_steps=0)


@functools.lru_cache(maxsize=64)
def _make_part(settings: RunSettings, data_dir: Path, rule: str, num_means: int) -> Part:
    """What is compiled once for all learning rates, lengths, seeds and weights of the drift's network."""

    def make_optimizer(
        learning_rate: Any, final_share: Any, num_steps: Any, params: Any
    ) -> optax.GradientTransformation:
        def schedule(count: Any) -> Any:
            cosine = (1 + jnp.cos(math.pi * jnp.minimum(count / num_steps, 1))) / 2
            return learning_rate * (final_share + (1 - final_share) * cosine)

        nowcast = wnn_jax.nowcast(LearnedDrift(params, json.loads(rule), num_means))
        tx = optax.chain(base_optimizer(settings.optimizer)(schedule), nowcast)
        return with_moving_averages(tx, (_EMA_DECAY,))

    task = settings.task(data_dir)
    return Part(Program(task, make_optimizer), all_readings({}, (_EMA_DECAY,)), BatchStatistics(task))
