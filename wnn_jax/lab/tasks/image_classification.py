"""Classification of images."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from wnn_jax.lab.tasks.data import (
    Augment,
    batch_indices,
    check_batch_size,
    describe_augment,
    random_affine,
    random_mirror,
)
from wnn_jax.lab.tasks.image_task import ImageTask
from wnn_jax.lab.tasks.models import MLP, ResNet, ThreeConv, VanillaCNN, takes_train
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task

_EVALUATION_BATCH_SIZE = 500


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageClassification(ImageTask):
    """Training of a network to classify images, by the cross entropy.

    Attributes:
      dataset: images with labels.
      model: maps images `[n, height, width, channels]` to logits `[n, num_classes]`. It may have batch normalisation,
        and then takes a keyword `train`.
      batch_size: images per step.
      augment: changes the training images, or `None`.
      training_examples: which part of the training images is used: start, stop and step as in a slice. The mean image
        and the initial weights are the same whatever the part is.

    Raises:
      UsageError: if there are fewer training images than a batch has, or the augmentation has no name.
    """

    augment: Augment | None = None
    training_examples: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self._examples))
        describe_augment(self.augment)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The share of images that are classified right, and the cross entropy."""
        return (
            Metric("accuracy", higher_is_better=True, format=".2%"),
            Metric("loss", higher_is_better=False),
        )

    def with_training_examples(self, examples: slice) -> "ImageClassification":
        """The same task with a part of its training images only.

        Args:
          examples: which ones of all training images.

        Raises:
          UsageError: if there are fewer than a batch has.
        """
        indices = examples.indices(len(self.dataset.train.labels))
        return dataclasses.replace(self, training_examples=indices)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {
            **super().describe(),
            "kind": "image classification",
            "augment": describe_augment(self.augment),
            "training_examples": None if self.training_examples is None else list(self.training_examples),
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them, and its batch statistics, if any."""
        images = self.dataset.preprocess(self.dataset.train.images[:1])
        variables = dict(self.model.init(key, images, **self._mode(train=False)))
        return variables.pop("params"), variables

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean cross entropy of a batch."""
        augment = None if self.augment is None else functools.partial(self.augment, key)
        images = self.dataset.preprocess(batch["images"], augment)
        logits, model_state = self.model.apply(
            {"params": params, **model_state}, images, **self._mode(train=True), mutable=list(model_state)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
        return loss, (dict(model_state), {})

    def batch(self, seed: int, step: int) -> Batch:
        """Images `[batch_size, height, width, channels]` uint8 and labels `[batch_size]` int32."""
        examples = self._examples
        indices = batch_indices(seed, step, num_examples=len(examples), batch_size=self.batch_size)
        # A range makes positions within the part that is used those among all training images.
        indices = examples.start + examples.step * indices
        return {"images": self.dataset.train.images[indices], "labels": self.dataset.train.labels[indices]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All images of a split, 500 at a time, with their labels."""
        images, labels = getattr(self.dataset, split)
        for start in range(0, len(labels), _EVALUATION_BATCH_SIZE):
            end = start + _EVALUATION_BATCH_SIZE
            yield {"images": images[start:end], "labels": labels[start:end]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The number of right answers and the sum of cross entropies, with running batch statistics."""
        images = self.dataset.preprocess(batch["images"])
        logits: Any = self.model.apply({"params": params, **model_state}, images, **self._mode(train=False))
        return self._sums(logits, batch["labels"])

    def _sums(self, logits: jax.Array, labels: jax.Array) -> Sums:
        """What `measure` returns, of logits `[..., num_classes]` and labels `[...]`."""
        count = jnp.float32(labels.size)
        return {
            "accuracy": (jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32), count),
            "loss": (optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), count),
        }

    @property
    def _examples(self) -> range:
        return range(*(self.training_examples or (0, len(self.dataset.train.labels), 1)))

    def _mode(self, *, train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train(self.model) else {}


def _task(dataset: str, model: nn.Module, batch_size: int, augment: Augment | None = None) -> Callable[[Path], Task]:
    return functools.partial(
        ImageClassification.load, dataset=dataset, model=model, batch_size=batch_size, augment=augment
    )


TASKS: dict[str, Callable[[Path], Task]] = {
    # Small enough for comparisons of many methods, and with the widths of no network of a family.
    "cifar10-16-three-conv": _task("cifar10-16", ThreeConv(features=(16, 24, 24)), 128),
    # The tasks C10/16, C10/32, C100/32, FM/16 and FM/32 of Knyazev et al., ICLR 2025.
    "cifar10-three-conv": _task("cifar10", ThreeConv(features=(16, 32, 32)), 128),
    "cifar10-three-conv-32": _task("cifar10", ThreeConv(features=(32, 64, 64)), 128),
    "cifar100-three-conv-32": _task("cifar100", ThreeConv(num_classes=100, features=(32, 64, 64)), 128),
    "fashion-mnist-three-conv": _task("fashion-mnist", ThreeConv(features=(16, 32, 32)), 128),
    "fashion-mnist-three-conv-32": _task("fashion-mnist", ThreeConv(features=(32, 64, 64)), 128),
    # The experiment of Jang et al., ICML 2023.
    "cifar10-vanilla": _task("cifar10", VanillaCNN(), 1024, random_affine),
    # The same at a quarter of the pixels.
    "cifar10-16-vanilla": _task("cifar10-16", VanillaCNN(), 1024, random_affine),
    "cifar10-16-resnet": _task("cifar10-16", ResNet(features=(8, 16, 32)), 128, random_mirror),
    "imagenet-64-resnet": _task(
        "imagenet-64", ResNet(num_classes=1_000, features=(32, 64, 128, 256), stem_strides=2), 128, random_mirror
    ),
    "mnist-mlp": _task("mnist", MLP(widths=(64,)), 128),
    # Seconds, and no download.
    "digits-cnn": _task("digits", VanillaCNN(features=(8, 16), hidden=(32,)), 64),
}
