"""Training of a small network with batch normalisation, and what averages of its weights score."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from wnn_jax import averaging
from wnn_jax.meta.datasets import Dataset, Split
from wnn_jax.meta.end_to_end import environment, save_json
from wnn_jax.meta.report import save_table

_EVALUATION_BATCH = 500
_WEIGHT_DECAY = 5e-4


class ResNet(nn.Module):
    """A ResNet of one block per stage, with batch normalisation."""

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[n, height, width, channels]` to logits `[n, num_classes]`."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(self.features[0], (3, 3), use_bias=False)(x)))
        for index, features in enumerate(self.features):
            strides = (1, 1) if index == 0 else (2, 2)
            branch = nn.relu(norm()(nn.Conv(features, (3, 3), strides, use_bias=False)(x)))
            branch = norm()(nn.Conv(features, (3, 3), use_bias=False)(branch))
            if index > 0:
                x = norm()(nn.Conv(features, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + branch)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class Trained(NamedTuple):
    """A network.

    Attributes:
      params: its parameters.
      stats: its statistics of batch normalisation.
      state: that of the optimizer.
    """

    params: Any
    stats: Any
    state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of these experiments."""

    data_dir: Path
    """Folder of data sets prepared by TensorFlow Datasets."""
    output: Path
    """Folder for results, table and plot. Finished runs in it are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one run per arm, with the same initial weights and data order."""
    num_epochs: int = 8
    """What every arm may cost in all, in epochs of training steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.1
    """Of SGD with Nesterov momentum 0.9, where it decays its initial one."""
    constant_learning_rate: float = 0.05
    """Where it does not, for averages along the way."""


class Lab:
    """What all arms share: data, network, and compiled functions."""

    def __init__(self, dataset: Dataset, options: Options) -> None:
        self.dataset = dataset
        self.options = options
        self.network = ResNet(dataset.num_classes)
        self.steps_per_epoch = len(dataset.train.targets) // options.batch_size
        self._logits = jax.jit(
            lambda params, stats, images: self.network.apply(
                {"params": params, "batch_stats": stats}, dataset.preprocess(images), train=False
            )
        )
        self._new_stats = jax.jit(self._apply_for_stats)

    def init(self, seed: int, tx: Any) -> Trained:
        """A network before training."""
        shape = (1, *self.dataset.train.inputs.shape[1:])
        variables = self.network.init(jax.random.key(seed), jnp.zeros(shape), train=False)
        return Trained(variables["params"], variables["batch_stats"], tx.init(variables["params"]))

    def loss(self, params: Any, stats: Any, images: Any, labels: Any) -> tuple[jax.Array, Any]:
        """Cross entropy with weight decay, and the statistics after the batch."""
        logits, mutated = self.network.apply(
            {"params": params, "batch_stats": stats}, self.dataset.preprocess(images), train=True, mutable="batch_stats"
        )
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        decay = _WEIGHT_DECAY / 2 * sum(jnp.sum(kernel**2) for kernel in kernels)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + decay, mutated["batch_stats"]

    def make_step(self, tx: Any) -> Callable[[Trained, Any, Any], Trained]:
        """A training step."""

        @functools.partial(jax.jit, donate_argnums=0)
        def step(trained: Trained, images: Any, labels: Any) -> Trained:
            gradient, stats = jax.grad(self.loss, has_aux=True)(trained.params, trained.stats, images, labels)
            updates, state = tx.update(gradient, trained.state, trained.params)
            return Trained(optax.apply_updates(trained.params, updates), stats, state)

        return step

    def batches(self, seed: int, first_epoch: int, num_epochs: int, split: Split | None = None) -> Iterator[Any]:
        """Batches of whole epochs of the training images, or of others for as many steps."""
        split = split or self.dataset.train
        size = self.options.batch_size
        for epoch in range(first_epoch, first_epoch + num_epochs):
            order = np.random.default_rng([seed, epoch])
            number = self.steps_per_epoch * size
            passes = -(-number // len(split.targets))
            indices = np.concatenate([order.permutation(len(split.targets)) for _ in range(passes)])[:number]
            for chosen in indices.reshape(-1, size):
                # Mirrored at random, as is usual for these images.
                images = split.inputs[chosen]
                mirrored = order.random(size) < 0.5
                images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
                yield images, split.targets[chosen]

    def train(self, trained: Trained, tx: Any, seed: int, first_epoch: int, num_epochs: int, **options: Any) -> Trained:
        """Trains for some epochs.

        Args:
          trained: where to start.
          tx: the optimizer.
          seed: decides the batches.
          first_epoch: the number of the first epoch.
          num_epochs: how many.
          **options: `on_epoch`, called with the number of each epoch and the network after it; `split`, see `batches`.
        """
        step = self.make_step(tx)
        on_epoch = options.get("on_epoch")
        for index, (images, labels) in enumerate(self.batches(seed, first_epoch, num_epochs, options.get("split"))):
            trained = step(trained, images, labels)
            if on_epoch and (index + 1) % self.steps_per_epoch == 0:
                on_epoch(first_epoch + index // self.steps_per_epoch, trained)
        return trained

    def sgd(self, *, decayed: bool, cycles_from: int | None = None, cycle: int = 1) -> optax.GradientTransformation:
        """SGD for a run of all epochs, warmed up in the first, and decayed to zero by a cosine or not at all.

        Args:
          decayed: whether it is.
          cycles_from: the epoch from which on it takes a step every `cycle` minibatches only.
          cycle: that number.
        """
        options = self.options
        total = options.num_epochs * self.steps_per_epoch
        if decayed:
            schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, self.steps_per_epoch, total)
        else:
            rate = options.constant_learning_rate
            schedule = optax.warmup_constant_schedule(0.0, rate, self.steps_per_epoch)
        first = total if cycles_from is None else cycles_from * self.steps_per_epoch

        def rate_at(count: Any) -> Any:
            return schedule(count + (cycle - 1) * jnp.maximum(count - first, 0))

        return optax.sgd(rate_at, momentum=0.9, nesterov=True)

    def with_new_stats(self, params: Any, stats: Any, seed: int, split: Split | None = None) -> Any:
        """Statistics estimated anew on one epoch of images."""
        variables = {"params": params, "batch_stats": stats}
        images = (images for images, _ in self.batches(seed, 10_000, 1, split))
        return averaging.update_batch_stats(self._new_stats, variables, images)["batch_stats"]

    def scores(self, params: Any, stats: Any) -> dict[str, float]:
        """Accuracies on the validation and the test images."""
        return {
            "validation": self._accuracy(params, stats, self.dataset.validation),
            "test": self._accuracy(params, stats, self.dataset.test),
        }

    def _accuracy(self, params: Any, stats: Any, split: Split) -> float:
        number = 0
        for start in range(0, len(split.targets), _EVALUATION_BATCH):
            logits = self._logits(params, stats, split.inputs[start : start + _EVALUATION_BATCH])
            number += int((np.argmax(logits, axis=1) == split.targets[start : start + _EVALUATION_BATCH]).sum())
        return number / len(split.targets)

    def _apply_for_stats(self, variables: Mapping[str, Any], images: Any) -> Any:
        return self.loss(variables["params"], variables["batch_stats"], images, jnp.zeros(len(images), jnp.int32))[1]


def run(options: Options, lab: Lab, arms: Callable[[Lab, int], Iterator[tuple[str, dict[str, float]]]]) -> None:
    """Runs all seeds, and reports.

    Args:
      options: the options.
      lab: what the arms share.
      arms: `(lab, seed) -> (name, scores)` for every arm.
    """
    console = Console()
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        file = options.output / f"seed{seed}.json"
        if not file.exists():
            scores = {}
            for name, of_arm in arms(lab, seed):
                scores[name] = of_arm
                console.print(f"seed {seed}, {name}: test {of_arm['test']:.2%}")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_json({"seed": seed, "scores": scores, "environment": environment()}, file)
        results.append(json.loads(file.read_text())["scores"])
    rows = [_row(name, [result[name] for result in results]) for name in results[0]]
    save_table(rows, options.output / "summary.csv")
    _save_plot({name: [result[name]["test"] for result in results] for name in results[0]}, options.output)
    table = Table("arm", "runs", "validation %", "test %", caption="mean ± std over seeds")
    for row in rows:
        cells = (f"{100 * row[f'{s}_mean']:.2f} ± {100 * row[f'{s}_std']:.2f}" for s in ("validation", "test"))
        table.add_row(row["arm"], str(row["runs"]), *cells)
    console.print(table)
    console.print(f"Results: {options.output}")


def _row(name: str, scores: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": name, "runs": len(scores)}
    for split in ("validation", "test"):
        values = [of_run[split] for of_run in scores]
        row |= {
            f"{split}_mean": statistics.mean(values),
            f"{split}_std": statistics.stdev(values) if len(values) > 1 else float("nan"),
        }
    return row


def _save_plot(accuracies: dict[str, list[float]], output: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from wnn_jax._files import replace_on_success

    figure, axis = plt.subplots(figsize=(8, 0.4 * len(accuracies) + 1.2), layout="constrained")
    for height, values in enumerate(accuracies.values()):
        axis.plot([100 * value for value in values], [height] * len(values), "o", color="C0", alpha=0.6)
        axis.plot(100 * statistics.mean(values), height, "|", color="black", markersize=14)
    axis.set_yticks(range(len(accuracies)), list(accuracies))
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy in % (one point per seed, and the mean)")
    axis.grid(alpha=0.3)
    with replace_on_success(output / "accuracies.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
