from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.meta.tasks.synthetic import synthetic_poses
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks.pose import PoseEstimation, gaussian_heatmaps, highest_places


class Constant(nn.Module):
    """Predicts the same heatmaps for all images."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        heatmaps = self.param("heatmaps", nn.initializers.zeros, [*images.shape[1:3], 17])
        return jnp.broadcast_to(heatmaps[None], [images.shape[0], *heatmaps.shape])


def make_task(**changes: Any) -> PoseEstimation:
    arguments: dict[str, Any] = {"dataset": synthetic_poses(), "model": Constant(), "batch_size": 20}
    return PoseEstimation(**(arguments | changes))


def measure(task: PoseEstimation, heatmaps: Any, batch: Any) -> Any:
    return jax.jit(task.measure)({"heatmaps": heatmaps}, {}, batch)


def test_heatmaps_are_gaussians_that_are_highest_at_the_keypoints():
    places = np.array([[[3.5, 10.5], [20.0, 5.0]]], np.float32)
    heatmaps = gaussian_heatmaps(jnp.asarray(places), 16, 24, sigma=2.0)
    assert heatmaps.shape == (1, 16, 24, 2)
    np.testing.assert_allclose(heatmaps[0, 10, 3, 0], 1)
    np.testing.assert_allclose(heatmaps[0, 10, 5, 0], np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(heatmaps[0, 8, 3, 0], np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(heatmaps[0, 5, 20, 1], np.exp(-0.0625), rtol=1e-6)
    np.testing.assert_array_equal(highest_places(heatmaps)[0, 0], places[0, 0])
    assert np.abs(highest_places(heatmaps) - places).max() <= 0.5


def test_only_labelled_keypoints_count():
    task = make_task()
    batch = next(task.evaluation_batches("test"))
    is_labelled = batch["keypoints"][..., 2] > 0
    sums = measure(task, jnp.zeros([64, 48, 17]), batch)
    assert 0 < is_labelled.sum() < is_labelled.size
    assert sums["pck"][1] == sums["mse"][1] == is_labelled.sum()
    # The integral of the square of a Gaussian of standard deviation 2 is 4 pi.
    np.testing.assert_allclose(sums["mse"][0] / sums["mse"][1], 4 * np.pi / (64 * 48), rtol=1e-3)
    moved = np.where(is_labelled[..., None], batch["keypoints"], 0)
    again = measure(task, jnp.zeros([64, 48, 17]), batch | {"keypoints": moved})
    jax.tree.map(np.testing.assert_array_equal, again, sums)


def test_a_keypoint_is_found_within_a_tenth_of_the_longer_side():
    task = make_task()
    batch = {key: value[:1] for key, value in task.batch(0, 0).items()}
    for shift, share in ((6, 1.0), (7, 0.0)):
        keypoints = batch["keypoints"] + np.array([shift, 0, 1], np.float32)
        heatmaps = gaussian_heatmaps(jnp.asarray(batch["keypoints"][..., :2]), 64, 48, sigma=2.0)[0]
        total, count = measure(task, heatmaps, batch | {"keypoints": keypoints})["pck"]
        assert total / count == share


def test_the_loss_is_the_mean_over_the_batch():
    task = make_task()
    params, batch = {"heatmaps": 0.1 * jnp.ones([64, 48, 17])}, task.batch(0, 0)
    compiled = jax.jit(task.loss)
    loss, (model_state, _) = compiled(params, {}, batch, jax.random.key(0))
    heatmaps = np.asarray(gaussian_heatmaps(jnp.asarray(batch["keypoints"][..., :2]), 64, 48, sigma=2.0))
    errors = ((heatmaps - 0.1) ** 2).mean(axis=(1, 2))[batch["keypoints"][..., 2] > 0]
    np.testing.assert_allclose(loss, errors.mean(), rtol=1e-4)
    assert model_state == {}
    nothing = batch["keypoints"] * np.array([1, 1, 0], np.float32)
    assert compiled(params, {}, batch | {"keypoints": nothing}, jax.random.key(0))[0] == 0


def test_bad_arguments_are_named():
    with pytest.raises(UsageError, match="batch_size=101 is larger than the training set of 100 examples"):
        make_task(batch_size=101)
