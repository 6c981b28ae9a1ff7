"""Tasks on images, and the classification of images."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data.datasets import Augment, ImageDataset, batch_indices, check_batch_size, consecutive_batches
from wnn_jax.lab.tasks.models import describe_model, train_option
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

_EVALUATION_BATCH_SIZE = 500


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageTask:
    """A network and its training images, `batch_size` per step.

    A batch size that is not positive or exceeds the number of training images is a `UsageError`.
    """

    dataset: ImageDataset
    model: nn.Module
    batch_size: int

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.dataset.train.images))

    def describe(self) -> Mapping[str, Any]:
        return {
            "dataset": {"name": self.dataset.name, "sha256": self.dataset.digest},
            "model": describe_model(self.model),
            "batch_size": self.batch_size,
        }

    def batch(self, seed: int, step: int) -> Batch:
        images = self.dataset.train.images
        return {"images": images[batch_indices(seed, step, num_examples=len(images), batch_size=self.batch_size)]}


def accuracy_and_loss(logits: jax.Array, labels: jax.Array) -> Sums:
    """Sum right answers and cross entropies, from logits `[..., num_classes]` and labels `[...]`."""
    count = jnp.float32(labels.size)
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    return {"accuracy": (correct, count), "loss": (cross_entropy, count)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageClassification(ImageTask):
    """A network learns to classify images, by the cross entropy.

    The model maps images `[n, height, width, channels]` to logits `[n, num_classes]`. If it has batch normalisation, it
    takes a keyword `train`. `training_examples` is the part of the training images to use: start, stop and step as in
    a slice. It changes neither the mean image nor the initial weights.

    A batch with more images than the training set, or an augmentation without a name, is a `UsageError`.
    """

    augment: Augment | None = None
    training_examples: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self._examples))
        if self.augment and "<" in getattr(self.augment, "__qualname__", "<unnamed>"):
            raise UsageError(
                f"augment={self.augment!r} has no name by which results could be told apart; write a function at the "
                "top level of a module."
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Metric("accuracy", higher_is_better=True, format=".2%"), Metric("loss", higher_is_better=False)

    def with_training_examples(self, examples: slice) -> "ImageClassification":
        """Return the same task on a part of its training images. A part smaller than a batch is a `UsageError`."""
        indices = examples.indices(len(self.dataset.train.labels))
        return dataclasses.replace(self, training_examples=indices)

    def describe(self) -> Mapping[str, Any]:
        return {
            **super().describe(),
            "kind": "image classification",
            "augment": {"name": self.augment.__qualname__, "options": {}} if self.augment else None,
            "training_examples": None if self.training_examples is None else list(self.training_examples),
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        images = self.dataset.preprocess(self.dataset.train.images[:1])
        variables = dict(self.model.init(key, images, **train_option(self.model, train=False)))
        return variables.pop("params"), variables

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        augment = None if self.augment is None else functools.partial(self.augment, key)
        images = self.dataset.preprocess(batch["images"], augment)
        logits, model_state = self.model.apply(
            {"params": params, **model_state}, images, **train_option(self.model, train=True), mutable=list(model_state)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
        return loss, dict(model_state)

    def batch(self, seed: int, step: int) -> Batch:
        examples = self._examples
        indices = batch_indices(seed, step, num_examples=len(examples), batch_size=self.batch_size)
        # From positions within the part that is used to positions among all training images.
        indices = examples.start + examples.step * indices
        return {"images": self.dataset.train.images[indices], "labels": self.dataset.train.labels[indices]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        return consecutive_batches(getattr(self.dataset, split)._asdict(), _EVALUATION_BATCH_SIZE)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        return self._sums(self._logits(params, model_state, batch["images"]), batch["labels"])

    def _logits(self, params: Params, model_state: ModelState, images: Any) -> Any:
        """Return the logits of uint8 images, with running batch statistics."""
        variables = {"params": params, **model_state}
        return self.model.apply(variables, self.dataset.preprocess(images), **train_option(self.model, train=False))

    def _sums(self, logits: jax.Array, labels: jax.Array) -> Sums:
        return accuracy_and_loss(logits, labels)

    @property
    def _examples(self) -> range:
        return range(*(self.training_examples or (0, len(self.dataset.train.labels), 1)))
