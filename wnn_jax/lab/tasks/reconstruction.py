"""Reconstruction of images: autoencoders."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax.lab.tasks.image_task import ImageTask
from wnn_jax.lab.tasks.models import MLP
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task

_EVALUATION_BATCH_SIZE = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction(ImageTask):
    """Training of a network with a narrow layer to give back the images that it is given, by the squared error.

    Attributes:
      dataset: images; their labels are not used.
      model: maps images `[n, height, width, channels]` to all their pixels `[n, height * width * channels]`.
      batch_size: images per step.

    Raises:
      UsageError: if there are fewer training images than a batch has.

    References:
      Hinton, Salakhutdinov, `Reducing the Dimensionality of Data with Neural Networks
      <https://doi.org/10.1126/science.1127647>`_, Science 2006
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean squared error of a pixel, of which white is 1 and black is 0."""
        return (Metric("mse", higher_is_better=False, format=".5f"),)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {**super().describe(), "kind": "reconstruction"}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them; there is no model state."""
        return self.model.init(key, self._scale(self.dataset.train.images[:1]))["params"], {}

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean squared error of a batch."""
        del key
        return self._errors(params, batch).mean(), (model_state, {})

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All images of a split, up to 1,000 at a time."""
        images = getattr(self.dataset, split).images
        for start in range(0, len(images), _EVALUATION_BATCH_SIZE):
            yield {"images": images[start : start + _EVALUATION_BATCH_SIZE]}

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


TASKS: dict[str, Callable[[Path], Task]] = {
    # Images of 14x14 pixels through a layer of 16.
    "mnist-autoencoder": functools.partial(
        Reconstruction.load, dataset="mnist-14", model=MLP(14 * 14, (128, 64, 16, 64, 128)), batch_size=128
    ),
}
