from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lab.tasks.synthetic import synthetic_images
from wnn_jax.lab.tasks.image_regression import Denoising, Reconstruction, cosine_schedule
from wnn_jax.lab.tasks.models import MLP


class Scale(nn.Module):
    """Predicts its input times a number."""

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array) -> jax.Array:
        return self.param("scale", nn.initializers.zeros, []) * images + 0 * times[:, None, None, None]


def make_task(**changes: Any) -> Denoising:
    arguments: dict[str, Any] = {"dataset": synthetic_images("mnist-14"), "model": Scale(), "batch_size": 64}
    return Denoising(**(arguments | changes))


def test_the_image_fades_away():
    left = cosine_schedule()
    assert left.shape == (1_000,)
    assert left[0] > 0.999
    assert left[-1] < 1e-4
    assert np.all(np.diff(left) < 0)


def test_predicting_nothing_costs_the_variance_of_the_noise():
    task = make_task()
    params, _ = jax.jit(task.init)(jax.random.key(0))
    loss, _ = task.loss(params, {}, task.batch(0, 0), jax.random.key(0))
    assert float(loss) == pytest.approx(1, abs=0.05)
    sums = task.measure(params, {}, next(task.evaluation_batches("validation")))
    assert float(sums["mse"][0] / sums["mse"][1]) == pytest.approx(1, abs=0.05)


def test_what_is_given_is_the_image_with_noise():
    task = make_task()
    batch = next(task.evaluation_batches("test"))
    left = cosine_schedule()[batch["times"]][:, None, None, None]
    images = batch["images"] / 127.5 - 1
    noisy = np.sqrt(left) * images + np.sqrt(1 - left) * batch["noise"]
    total, weight = task.measure({"scale": jnp.float32(0.5)}, {}, batch)["mse"]
    assert weight == 40
    np.testing.assert_allclose(total / weight, np.mean((0.5 * noisy - batch["noise"]) ** 2), rtol=1e-4)


def test_evaluation_is_always_of_the_same_noise():
    task, other = make_task(), make_task(batch_size=32)
    validation, again = (list(each.evaluation_batches("validation")) for each in (task, other))
    assert [len(batch["images"]) for batch in validation] == [250, 250, 3]
    jax.tree.map(np.testing.assert_array_equal, validation, again)
    noise, times = (np.concatenate([batch[name] for batch in validation]) for name in ("noise", "times"))
    np.testing.assert_allclose((noise.mean(), noise.std()), (0, 1), atol=0.02)
    assert np.histogram(times, 4, (0, 999))[0].min() > 90
    assert not np.array_equal(next(task.evaluation_batches("test"))["noise"], noise[:40])


def test_noise_in_training_is_of_the_key():
    task = make_task()
    params, batch = {"scale": jnp.float32(0.5)}, task.batch(0, 0)
    losses = [float(task.loss(params, {}, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_error_of_a_reconstruction_is_of_all_pixels():
    task = Reconstruction(dataset=synthetic_images("mnist-14"), model=MLP(14 * 14, (4,)), batch_size=8)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    batch = next(task.evaluation_batches("test"))
    images = batch["images"] / 255
    errors = np.mean((np.asarray(task.model.apply({"params": params}, images)) - images.reshape(40, -1)) ** 2)
    total, weight = task.measure(params, {}, batch)["mse"]
    np.testing.assert_allclose(total / weight, errors, rtol=1e-5)
    np.testing.assert_allclose(task.loss(params, {}, batch, jax.random.key(0))[0], errors, rtol=1e-5)
