"""Classification of images."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wnn_jax.lab.tasks.data import Augment, batch_indices, check_batch_size, consecutive_batches, describe_augment
from wnn_jax.lab.tasks.image_task import ImageTask
from wnn_jax.lab.tasks.models import takes_train
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

_EVALUATION_BATCH_SIZE = 500


def accuracy_and_loss(logits: jax.Array, labels: jax.Array) -> Sums:
    """The sums of right answers and of cross entropies, from logits `[..., num_classes]` and labels `[...]`."""
    count = jnp.float32(labels.size)
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    return {"accuracy": (correct, count), "loss": (cross_entropy, count)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageClassification(ImageTask):
    """A network learns to classify images, by the cross entropy.

    Attributes:
      dataset: images with labels.
      model: maps images `[n, height, width, channels]` to logits `[n, num_classes]`. If it has batch normalisation, it
        takes a keyword `train`.
      batch_size: images per step.
      augment: changes the training images, or `None`.
      training_examples: the part of the training images to use: start, stop and step as in a slice. It changes neither
        the mean image nor the initial weights.

    Raises:
      UsageError: if a batch has more images than the training set, or the augmentation has no name.
    """

    augment: Augment | None = None
    training_examples: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self._examples))
        describe_augment(self.augment)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The share of images that are classified right, and the cross entropy."""
        return Metric("accuracy", higher_is_better=True, format=".2%"), Metric("loss", higher_is_better=False)

    def with_training_examples(self, examples: slice) -> "ImageClassification":
        """The same task on a part of its training images. A part smaller than a batch is a `UsageError`."""
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

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
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
        # From positions within the part that is used to positions among all training images.
        indices = examples.start + examples.step * indices
        return {"images": self.dataset.train.images[indices], "labels": self.dataset.train.labels[indices]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All images of a split, 500 at a time, with their labels."""
        return consecutive_batches(getattr(self.dataset, split)._asdict(), _EVALUATION_BATCH_SIZE)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The number of right answers and the sum of cross entropies, with running batch statistics."""
        images = self.dataset.preprocess(batch["images"])
        logits: Any = self.model.apply({"params": params, **model_state}, images, **self._mode(train=False))
        return self._sums(logits, batch["labels"])

    def _sums(self, logits: jax.Array, labels: jax.Array) -> Sums:
        return accuracy_and_loss(logits, labels)

    @property
    def _examples(self) -> range:
        return range(*(self.training_examples or (0, len(self.dataset.train.labels), 1)))

    def _mode(self, *, train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train(self.model) else {}
