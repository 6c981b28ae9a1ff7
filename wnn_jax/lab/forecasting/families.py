"""Families: seeded distributions of training runs, from which trajectories are collected."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from wnn_jax.lab.errors import look_up
from wnn_jax.lab.tasks.data import load_dataset
from wnn_jax.lab.tasks.data.datasets import TextDataset
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.language_model import LanguageModel
from wnn_jax.lab.tasks.models import ARCHITECTURES
from wnn_jax.lab.tasks.task import Task

OptimizerName = Literal["adam", "adamw", "sgd"]

# A nowcaster is trained on `train` and selected on the two validation splits. The two test splits give its reported
# score, and nothing else ever sees them. The networks of the two architecture splits are in no other split.
SplitName = Literal["train", "validation", "test", "validation architecture", "test architecture"]
VALIDATION_SPLITS: tuple[SplitName, ...] = ("validation", "validation architecture")
TEST_SPLITS: tuple[SplitName, ...] = ("test", "test architecture")
SPLITS: tuple[SplitName, ...] = ("train", *VALIDATION_SPLITS, *TEST_SPLITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The values that entirely determine one training run, with lengths in optimizer steps.

    `final_learning_rate` is a share of the initial one: 1 is constant, less a cosine decay. `context_length` is the
    number of tokens that a language model sees at once. Other tasks ignore it.
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
    context_length: int = 32

    @property
    def program(self) -> Self:
        """The settings that decide the compiled program. Runs with equal programs share one."""
        return dataclasses.replace(self, learning_rate=0.0, final_learning_rate=0.0, seed=0)

    def task(self, data_dir: Path) -> Task:
        """Make the task of the run. An unknown name or a missing data set is a `UsageError`."""
        make_model = look_up(ARCHITECTURES, self.architecture, "the architecture")
        data, size = load_dataset(self.dataset, data_dir), self.batch_size
        if isinstance(data, TextDataset):
            model = make_model(data.vocab_size)
            return LanguageModel(dataset=data, model=model, batch_size=size, context_length=self.context_length)
        return ImageClassification(dataset=data, model=make_model(data.num_classes), batch_size=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFamily:
    """A seeded distribution of training runs. Every index has fixed settings.

    Runs come in groups of one program, which differ only in seed, learning rate and decay. A group belongs to one
    split.

    Attributes:
      name: its name in `FAMILIES`.
      datasets: data set -> the architectures that are drawn with it. All pairs are equally likely.
      validation_architectures: architectures held out to select nowcasters.
      test_architectures: architectures held out for the scores of selected nowcasters.
      learning_rates: optimizer -> the range of a log-uniform distribution.
      batch_sizes: drawn uniformly.
      num_steps: length of a run in optimizer steps.
      snapshot_every: steps between snapshots.
      context_length: tokens that a language model sees at once.
      group_size: runs per group.
      validation_share: the share of groups, among the other architectures, held out to select nowcasters.
      test_share: the share of the same groups held out for the scores of selected nowcasters.
      seed: the seed of the distribution.
    """

    name: str
    datasets: Mapping[str, tuple[str, ...]]
    validation_architectures: tuple[str, ...]
    test_architectures: tuple[str, ...]
    learning_rates: Mapping[OptimizerName, tuple[float, float]]
    batch_sizes: tuple[int, ...]
    num_steps: int
    snapshot_every: int
    context_length: int = 32
    group_size: int = 4
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def settings(self, index: int) -> RunSettings:
        """Return the settings of the run with an index >= 0."""
        group, _ = self._group(index)
        rng = np.random.default_rng([self.seed, index, 1])
        low, high = self.learning_rates[group["optimizer"]]
        return RunSettings(
            **group,
            learning_rate=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
            final_learning_rate=float(rng.choice([1.0, 1.0, 0.1, 0.0])),
            num_steps=self.num_steps,
            snapshot_every=self.snapshot_every,
            context_length=self.context_length,
            seed=index,
        )

    def split(self, index: int) -> SplitName:
        """Return the split of the run with this index, the same for its whole group."""
        group, draw = self._group(index)
        if group["architecture"] in self.validation_architectures:
            return "validation architecture"
        if group["architecture"] in self.test_architectures:
            return "test architecture"
        if draw < self.validation_share:
            return "validation"
        return "test" if draw < self.validation_share + self.test_share else "train"

    def _group(self, index: int) -> tuple[dict[str, Any], float]:
        """Return what the runs of a group share, and the number in [0, 1) that decides their split."""
        rng = np.random.default_rng([self.seed, index // self.group_size, 0])
        pairs = [(dataset, name) for dataset, architectures in self.datasets.items() for name in architectures]
        dataset, architecture = pairs[rng.integers(len(pairs))]
        settings = {
            "dataset": dataset,
            "architecture": architecture,
            "optimizer": str(rng.choice(list(self.learning_rates))),
            "batch_size": int(rng.choice(list(self.batch_sizes))),
        }
        return settings, rng.uniform()


_PLAIN_CNNS = ("cnn-8-16", "cnn-16-32", "cnn-8-16-32", "cnn-16-16-32", "lenet")
_NORMALIZED_CNNS = ("vgg", "resnet", "mobilenet-v2", "shufflenet-v2", "densenet")
_LEARNING_RATES: Mapping[OptimizerName, tuple[float, float]] = {
    "adam": (1e-3, 1.2e-2),
    "adamw": (1e-3, 1.2e-2),
    "sgd": (1e-2, 2e-1),
}

FAMILIES: dict[str, TaskFamily] = {
    # Two minutes of runs without a download, for tests and a first look. The first 12 runs have all splits.
    "digits": TaskFamily(
        name="digits",
        datasets={"digits": ("mlp-64", "mlp-128-64", "cnn-8-16", "cnn-16-32")},
        validation_architectures=("mlp-128-64",),
        test_architectures=("cnn-16-32",),
        learning_rates=_LEARNING_RATES,
        batch_sizes=(32, 64),
        num_steps=1_000,
        snapshot_every=10,
        group_size=2,
        validation_share=0.2,
        test_share=0.2,
        seed=581,
    ),
    # Networks of one form, which end with average pooling, on images with a quarter of the pixels.
    "three-conv": TaskFamily(
        name="three-conv",
        datasets={
            "cifar10-16": ("three-conv-8-16-16", "three-conv-12-16-32", "three-conv-12-24-24", "three-conv-24-24-48")
        },
        validation_architectures=("three-conv-12-16-32",),
        test_architectures=("three-conv-24-24-48",),
        learning_rates={"adam": (1e-3, 1.2e-2), "adamw": (1e-3, 1.2e-2)},
        batch_sizes=(64, 128),
        num_steps=4_000,
        snapshot_every=20,
        group_size=2,
    ),
    # Networks of many forms, on images and text.
    "small": TaskFamily(
        name="small",
        datasets={
            "cifar10-16": (*_PLAIN_CNNS, *_NORMALIZED_CNNS),
            "mnist-14": ("mlp-64", "mlp-128-64", "cnn-8-16", "lenet", "vgg", "resnet", "densenet"),
            "tiny_shakespeare": ("transformer-1x32", "transformer-2x24", "transformer-2x32"),
        },
        validation_architectures=("resnet",),
        test_architectures=("shufflenet-v2",),
        learning_rates=_LEARNING_RATES,
        batch_sizes=(32, 64, 128),
        num_steps=4_000,
        snapshot_every=20,
    ),
}
