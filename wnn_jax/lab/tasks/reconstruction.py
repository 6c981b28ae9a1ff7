"""Reconstruction of images: autoencoders."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax.lab.tasks.data import consecutive_batches
from wnn_jax.lab.tasks.image_task import ImageTask
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

_EVALUATION_BATCH_SIZE = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction(ImageTask):
    """A network with a narrow layer learns to return its input images, by the squared error.

    Labels are not used. The model maps images `[n, height, width, channels]` to all their pixels
    `[n, height * width * channels]`.

    References:
      Hinton, Salakhutdinov, `Reducing the Dimensionality of Data with Neural Networks
      <https://doi.org/10.1126/science.1127647>`_, Science 2006
    """

    # Of a pixel, where white is 1 and black is 0.
    metrics = (Metric("mse", higher_is_better=False, format=".5f"),)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {**super().describe(), "kind": "reconstruction"}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them. There is no model state."""
        return self.model.init(key, self._scale(self.dataset.train.images[:1]))["params"], {}

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        """The mean squared error of a batch."""
        del key
        return self._errors(params, batch).mean(), (model_state, {})

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All images of a split, up to 1,000 at a time."""
        return consecutive_batches({"images": getattr(self.dataset, split).images}, _EVALUATION_BATCH_SIZE)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The sum over images of the mean squared error."""
        del model_state
        errors = self._errors(params, batch)
        return {"mse": (errors.sum(), jnp.float32(errors.shape[0]))}

    def _scale(self, images: Any) -> jax.Array:
        """Images in [0, 1]."""
        return jnp.asarray(images, jnp.float32) / self.dataset.max_value

    def _errors(self, params: Params, batch: Batch) -> jax.Array:
        """The mean squared error of every image, `[n]`."""
        images = self._scale(batch["images"])
        pixels: Any = self.model.apply({"params": params}, images)
        return jnp.mean((pixels - images.reshape(images.shape[0], -1)) ** 2, axis=1)
