"""Denoising diffusion: prediction of the noise in an image."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.image_task import ImageTask
from wnn_jax.lab.tasks.models import UNet
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task

_EVALUATION_BATCH_SIZE = 250
_MAX_EVALUATION_IMAGES = 2_000
_SPLIT_SEEDS: Mapping[EvaluationSplit, int] = {"validation": 1, "test": 2}


def cosine_schedule(num_times: int) -> np.ndarray:
    """The share of the image's variance that is left at each time, `[num_times]` float32.

    The cosine schedule of Nichol and Dhariwal, ICML 2021, equation 17: time `t` of them is index `t - 1` here.
    """
    times = np.arange(num_times + 1) / num_times
    left = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return (left[1:] / left[0]).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Denoising(ImageTask):
    """Training of a network to tell the noise in an image from the image (Ho et al., NeurIPS 2020).

    The loss is equation 14 of the paper: the squared error of the predicted noise, at a time that is drawn uniformly
    for every image. In evaluation the time and the noise of every image are always the same, and the first 2,000
    images of a split are used, or all where there are fewer.

    Attributes:
      dataset: images; their labels are not used.
      model: maps noisy images `[n, height, width, channels]` and times `[n]` to noise of the shape of the images.
      batch_size: images per step.
      num_times: number of different levels of noise.

    Raises:
      UsageError: if there are fewer training images than a batch has.
    """

    num_times: int = 1_000

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean squared error of the predicted noise, whose variance is 1."""
        return (Metric("mse", higher_is_better=False),)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {
            **super().describe(),
            "kind": "denoising diffusion",
            "num_times": self.num_times,
            "schedule": "cosine",
            "max_evaluation_images": _MAX_EVALUATION_IMAGES,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them; there is no model state."""
        images = self._scale(self.dataset.train.images[:1])
        return self.model.init(key, images, jnp.zeros([1], jnp.int32))["params"], {}

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean squared error on a batch, at times and with noise drawn with the key."""
        images = self._scale(batch["images"])
        time_key, noise_key = jax.random.split(key)
        times = jax.random.randint(time_key, images.shape[:1], 0, self.num_times)
        noise = jax.random.normal(noise_key, images.shape)
        return self._errors(params, images, times, noise).mean(), (model_state, {})

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """Images of a split, up to 250 at a time, with times `[n]` int32 and noise float32 of the images' shape."""
        images = getattr(self.dataset, split).images[:_MAX_EVALUATION_IMAGES]
        times, noise = _evaluation_noise(_SPLIT_SEEDS[split], images.shape, self.num_times)
        for start in range(0, len(images), _EVALUATION_BATCH_SIZE):
            chosen = slice(start, start + _EVALUATION_BATCH_SIZE)
            yield {"images": images[chosen], "times": times[chosen], "noise": noise[chosen]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The sum over images of the mean squared error."""
        del model_state
        errors = self._errors(params, self._scale(batch["images"]), batch["times"], batch["noise"])
        return {"mse": (errors.sum(), jnp.float32(errors.shape[0]))}

    def sample(self, params: Params, noise: jax.Array, *, num_steps: int = 100) -> jax.Array:
        """Images that the network makes of noise, by DDIM without further noise (Song et al., ICLR 2021, equation 12).

        The image that is predicted at a step is clipped to the range of pixels, and the noise is what then remains.

        Args:
          params: the parameters.
          noise: `[n, height, width, channels]` float32, normal with variance 1.
          num_steps: at how many of the times, spread evenly, the network is asked.

        Returns:
          Images `[n, height, width, channels]` float32 in [0, 1].

        Raises:
          UsageError: if there are fewer times than steps, or no step.
        """
        if not 1 <= num_steps <= self.num_times:
            raise UsageError(f"num_steps={num_steps} must be positive and at most num_times={self.num_times}.")
        times = np.linspace(self.num_times - 1, 0, num_steps).round().astype(np.int32)
        left = np.append(cosine_schedule(self.num_times)[times], np.float32(1))
        # A loop in Python: on CPU convolutions are some 20 times slower in one that is compiled.
        step, images = jax.jit(self._sampling_step), noise
        for time, before, after in zip(times, left[:-1], left[1:], strict=True):
            images = step(params, images, time, before, after)
        return (images + 1) / 2

    def _scale(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Images in [-1, 1]."""
        return jnp.asarray(images, jnp.float32) * (2 / self.dataset.max_value) - 1

    def _errors(self, params: Params, images: jax.Array, times: jax.Array, noise: jax.Array) -> jax.Array:
        """The mean squared error of the noise predicted for every image, `[n]`."""
        left = jnp.asarray(cosine_schedule(self.num_times))[times][:, None, None, None]
        noisy = jnp.sqrt(left) * images + jnp.sqrt(1 - left) * noise
        return jnp.mean((self._predict(params, noisy, times) - noise) ** 2, axis=(1, 2, 3))

    def _predict(self, params: Params, noisy: jax.Array, times: jax.Array) -> Any:
        """The noise in images, of their shape, at the times `[n]`."""
        # The embedding of times has frequencies that are made for a thousand of them.
        return self.model.apply({"params": params}, noisy, times * (1_000 / self.num_times))

    def _sampling_step(
        self, params: Params, noisy: jax.Array, time: jax.Array, before: jax.Array, after: jax.Array
    ) -> jax.Array:
        """Images in which `after` of the variance is left, of noisy ones in which it is `before`, at a time."""
        noise = self._predict(params, noisy, jnp.broadcast_to(time, noisy.shape[:1]))
        images = jnp.clip((noisy - jnp.sqrt(1 - before) * noise) / jnp.sqrt(before), -1, 1)
        noise = (noisy - jnp.sqrt(before) * images) / jnp.sqrt(1 - before)
        return jnp.sqrt(after) * images + jnp.sqrt(1 - after) * noise


@functools.lru_cache(maxsize=8)
def _evaluation_noise(seed: int, shape: tuple[int, ...], num_times: int) -> tuple[np.ndarray, np.ndarray]:
    """Times `[n]` and noise `shape`; those of an image do not depend on how many images follow."""
    times_rng, noise_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    times = times_rng.integers(num_times, size=shape[0], dtype=np.int32)
    return times, noise_rng.standard_normal(shape, dtype=np.float32)


TASKS: dict[str, Callable[[Path], Task]] = {
    # On images of 14x14 pixels: the U-Net works at 14x14 and 7x7.
    "mnist-diffusion": functools.partial(Denoising.load, dataset="mnist-14", model=UNet(), batch_size=64),
    # At 16x16 and 8x8.
    "cifar10-16-diffusion": functools.partial(
        Denoising.load, dataset="cifar10-16", model=UNet((16, 32)), batch_size=16
    ),
}
