"""Training tasks as data, and families of them to draw from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from wnn_jax.meta.architectures import LANGUAGE_MODELS
from wnn_jax.meta.errors import UsageError

OptimizerName = Literal["adam", "adamw", "sgd"]
SplitName = Literal["train", "validation", "held-out architecture"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One training run, entirely determined by these values.

    Attributes:
      architecture: a name in `ARCHITECTURES`.
      dataset: a name in `DATASETS`.
      optimizer: Adam; AdamW with a weight decay of 0.01; SGD with a momentum of 0.9.
      learning_rate: the initial one.
      final_learning_rate: the last one as a share of the initial one: 1 for a constant rate, less for a cosine decay.
      batch_size: examples per step.
      num_steps: length of the run in optimizer steps.
      snapshot_every: steps between snapshots of the weights.
      seed: decides the initial weights and the order of the data.
    """

    architecture: str
    dataset: str
    optimizer: OptimizerName
    learning_rate: float
    final_learning_rate: float
    batch_size: int
    num_steps: int
    snapshot_every: int
    seed: int

    @property
    def program(self) -> Self:
        """The task without what can vary within one compiled program: tasks with equal programs share it."""
        return dataclasses.replace(self, learning_rate=0.0, final_learning_rate=0.0, seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFamily:
    """A seeded distribution of tasks: the task of every index is fixed.

    Tasks come in groups, which differ within in seed, learning rate and decay only. A whole group belongs to one split.

    Attributes:
      name: its name in `FAMILIES`.
      datasets: data set -> the architectures that are drawn with it. All pairs are equally likely.
      held_out_architectures: those kept for validation, which no nowcaster is trained on.
      learning_rates: optimizer -> the range of a log-uniform distribution.
      batch_sizes: drawn uniformly.
      num_steps: length of a run in optimizer steps.
      snapshot_every: steps between snapshots.
      group_size: tasks per group.
      validation_share: the share of the other groups that is kept for validation.
      seed: of the distribution.
    """

    name: str
    datasets: Mapping[str, tuple[str, ...]]
    held_out_architectures: tuple[str, ...]
    learning_rates: Mapping[str, tuple[float, float]]
    batch_sizes: tuple[int, ...]
    num_steps: int
    snapshot_every: int
    group_size: int = 4
    validation_share: float = 0.1
    seed: int = 0

    def task(self, index: int) -> Task:
        """The task of an index >= 0."""
        group = self._group(index)
        rng = np.random.default_rng([self.seed, index, 1])
        low, high = self.learning_rates[group["optimizer"]]
        return Task(
            architecture=group["architecture"],
            dataset=group["dataset"],
            optimizer=group["optimizer"],
            batch_size=group["batch_size"],
            learning_rate=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
            final_learning_rate=float(rng.choice([1.0, 1.0, 0.1, 0.0])),
            num_steps=self.num_steps,
            snapshot_every=self.snapshot_every,
            seed=index,
        )

    def split(self, index: int) -> SplitName:
        """What the run of an index is for: the same for all tasks of a group."""
        group = self._group(index)
        if group["architecture"] in self.held_out_architectures:
            return "held-out architecture"
        return "validation" if group["validation_draw"] < self.validation_share else "train"

    def _group(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index // self.group_size, 0])
        pairs = [(dataset, architecture) for dataset, those in self.datasets.items() for architecture in those]
        dataset, architecture = pairs[rng.integers(len(pairs))]
        return {
            "dataset": dataset,
            "architecture": architecture,
            "optimizer": str(rng.choice(list(self.learning_rates))),
            "batch_size": int(rng.choice(list(self.batch_sizes))),
            "validation_draw": rng.uniform(),
        }


_CONVOLUTIONAL = (
    "cnn-8-16",
    "cnn-16-32",
    "cnn-8-16-32",
    "cnn-16-16-32",
    "lenet",
    "vgg",
    "resnet",
    "mobilenet-v2",
    "shufflenet-v2",
    "densenet",
)
_LEARNING_RATES = {"adam": (1e-3, 1.2e-2), "adamw": (1e-3, 1.2e-2), "sgd": (1e-2, 2e-1)}

FAMILIES: Mapping[str, TaskFamily] = {
    # Two minutes of tasks that need no download: for tests and for a first look.
    "digits": TaskFamily(
        name="digits",
        datasets={"digits": ("mlp-64", "mlp-128-64", "cnn-8-16")},
        held_out_architectures=("mlp-128-64",),
        learning_rates=_LEARNING_RATES,
        batch_sizes=(32, 64),
        num_steps=1_000,
        snapshot_every=10,
        group_size=2,
    ),
    # What the bundled nowcasters are trained on: these two.
    "pooled": TaskFamily(
        name="pooled",
        datasets={"cifar10-16": ("three-conv-8-16-16", "three-conv-12-24-24", "three-conv-24-24-48")},
        held_out_architectures=("three-conv-24-24-48",),
        learning_rates={"adam": (1e-3, 1.2e-2), "adamw": (1e-3, 1.2e-2)},
        batch_sizes=(64, 128),
        num_steps=4_000,
        snapshot_every=20,
        group_size=2,
    ),
    "small": TaskFamily(
        name="small",
        datasets={
            "cifar10-16": _CONVOLUTIONAL,
            "mnist-14": ("mlp-64", "mlp-128-64", "cnn-8-16", "lenet", "vgg", "resnet", "densenet"),
            "tiny_shakespeare": tuple(sorted(LANGUAGE_MODELS)),
        },
        held_out_architectures=("resnet", "shufflenet-v2"),
        learning_rates=_LEARNING_RATES,
        batch_sizes=(32, 64, 128),
        num_steps=4_000,
        snapshot_every=20,
    ),
}


def family_of(name: str) -> TaskFamily:
    """The family of a name.

    Raises:
      UsageError: if there is none.
    """
    if name not in FAMILIES:
        raise UsageError(f"--family {name!r} is not known; choose from {', '.join(FAMILIES)}.")
    return FAMILIES[name]
