"""Prediction of images by the squared error: autoencoders, and denoising diffusion."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.tasks.data.datasets import consecutive_batches
from wnn_jax.lab.tasks.image_classification import ImageTask
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

_NUM_TIMES = 1_000
_MAX_DENOISED_IMAGES = 2_000
_SPLIT_SEEDS: Mapping[EvaluationSplit, int] = {"validation": 1, "test": 2}


class Reconstruction(ImageTask):
    """A network with a narrow layer learns to return its input images (Hinton and Salakhutdinov, Science 2006).

    The loss is the mean squared error. The model maps images `[n, height, width, channels]` to all their pixels
    `[n, height * width * channels]`. It has no model state.
    """

    # Of a pixel, where white is 1 and black is 0.
    metrics = (Metric("mse", higher_is_better=False, format=".5f"),)

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "kind": "reconstruction"}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        return self.model.init(key, self._scale(self.dataset.train.images[:1]))["params"], {}

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        del key
        return self._errors(params, batch).mean(), model_state

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        return consecutive_batches({"images": getattr(self.dataset, split).images}, 1_000)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        del model_state
        errors = self._errors(params, batch)
        return {"mse": (errors.sum(), jnp.float32(errors.shape[0]))}

    def _scale(self, images: Any) -> jax.Array:
        """Scale images to [0, 1]."""
        return jnp.asarray(images, jnp.float32) / self.dataset.max_value

    def _errors(self, params: Params, batch: Batch) -> jax.Array:
        """Return the mean squared error of every image, `[n]`."""
        images = self._scale(batch["images"])
        pixels: Any = self.model.apply({"params": params}, images)
        return jnp.mean((pixels - images.reshape(images.shape[0], -1)) ** 2, axis=1)


class Denoising(Reconstruction):
    """A network learns to predict the noise in an image (Ho et al., NeurIPS 2020).

    The loss is equation 14 of the paper: the squared error of the predicted noise, at a random time for every image.
    Evaluation uses the first 2,000 images of a split at most, each always with the same time and noise.
    The model maps noisy images `[n, height, width, channels]` and times `[n]` to noise with the shape of the images.
    """

    # Of the predicted noise, which has variance 1.
    metrics = (Metric("mse", higher_is_better=False),)

    def describe(self) -> Mapping[str, Any]:
        return {
            **super().describe(),
            "kind": "denoising diffusion",
            "num_times": _NUM_TIMES,
            "schedule": "cosine",
            "max_evaluation_images": _MAX_DENOISED_IMAGES,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        images = self._scale(self.dataset.train.images[:1])
        return self.model.init(key, images, jnp.zeros([1], jnp.int32))["params"], {}

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        images, (time_key, noise_key) = batch["images"], jax.random.split(key)
        times = jax.random.randint(time_key, images.shape[:1], 0, _NUM_TIMES)
        noise = jax.random.normal(noise_key, images.shape)
        return super().loss(params, model_state, {"images": images, "times": times, "noise": noise}, key)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        images = getattr(self.dataset, split).images[:_MAX_DENOISED_IMAGES]
        # From two generators, so that the noise of an image does not depend on how many images follow.
        times_rng, noise_rng = (np.random.default_rng([_SPLIT_SEEDS[split], part]) for part in range(2))
        times = times_rng.integers(_NUM_TIMES, size=len(images), dtype=np.int32)
        noise = noise_rng.standard_normal(images.shape, dtype=np.float32)
        return consecutive_batches({"images": images, "times": times, "noise": noise}, 250)

    def _scale(self, images: Any) -> jax.Array:
        """Scale images to [-1, 1]."""
        return jnp.asarray(images, jnp.float32) * (2 / self.dataset.max_value) - 1

    def _errors(self, params: Params, batch: Batch) -> jax.Array:
        images, times, noise = self._scale(batch["images"]), batch["times"], batch["noise"]
        left = jnp.asarray(cosine_schedule())[times][:, None, None, None]
        noisy = jnp.sqrt(left) * images + jnp.sqrt(1 - left) * noise
        predicted: Any = self.model.apply({"params": params}, noisy, times)
        return jnp.mean((predicted - noise) ** 2, axis=(1, 2, 3))


def cosine_schedule() -> np.ndarray:
    """Return the share of the image's variance that is left at each time, `[1000]` float32.

    This is the cosine schedule of Nichol and Dhariwal, ICML 2021, equation 17. Their time `t` is index `t - 1` here.
    """
    times = np.arange(_NUM_TIMES + 1) / _NUM_TIMES
    left = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return (left[1:] / left[0]).astype(np.float32)
