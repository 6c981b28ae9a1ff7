"""Pose estimation: where the joints of a person are."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax.meta.tasks.data import PoseDataset, batch_indices, check_batch_size, load_poses
from wnn_jax.meta.tasks.models import SegmentationUNet, describe_model
from wnn_jax.meta.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task

_EVALUATION_BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PoseEstimation:
    """Training of a network to draw a heatmap for every keypoint of a person, by the squared error.

    The heatmap of a keypoint is to be 1 at its place and a Gaussian around it (Xiao et al., section 2). Keypoints that
    are not labelled do not count. A keypoint is found if the highest value of its heatmap is within a tenth of the
    image's longer side of it: PCK, the percentage of correct keypoints, at 0.1 of the person's box (Yang and Ramanan,
    TPAMI 2013), which the image is.

    Attributes:
      dataset: images of one person each, with keypoints.
      model: maps images `[n, height, width, 3]` to heatmaps `[n, height, width, num_keypoints]`.
      batch_size: images per step.
      sigma: of the Gaussian, in pixels.
      radius: within which share of the longer side a keypoint is found.

    Raises:
      UsageError: if there are fewer training images than a batch has.

    References:
      Xiao, Wu, Wei, `Simple Baselines for Human Pose Estimation and Tracking <https://arxiv.org/abs/1804.06208>`_,
      ECCV 2018
    """

    dataset: PoseDataset
    model: nn.Module
    batch_size: int
    sigma: float = 2.0
    radius: float = 0.1

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.dataset.train.images))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The share of keypoints that are found, and the mean squared error of a pixel of their heatmaps."""
        return (
            Metric("pck", higher_is_better=True, format=".2%"),
            Metric("mse", higher_is_better=False, format=".5f"),
        )

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {
            "kind": "pose estimation",
            "dataset": {"name": self.dataset.name, "sha256": self.dataset.digest},
            "model": describe_model(self.model),
            "batch_size": self.batch_size,
            "sigma": self.sigma,
            "radius": self.radius,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them; there is no model state."""
        return self.model.init(key, _scale(self.dataset.train.images[:1]))["params"], {}

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean squared error of the heatmaps of the labelled keypoints of a batch."""
        del key
        total, count = self.measure(params, model_state, batch)["mse"]
        return total / jnp.maximum(count, 1), (model_state, {})

    def batch(self, seed: int, step: int) -> Batch:
        """Images `[batch_size, height, width, 3]` uint8 and keypoints `[batch_size, num_keypoints, 3]` float32."""
        train = self.dataset.train
        indices = batch_indices(seed, step, num_examples=len(train.images), batch_size=self.batch_size)
        return {"images": train.images[indices], "keypoints": train.keypoints[indices]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All images of a split, up to 250 at a time, with their keypoints."""
        images, keypoints = getattr(self.dataset, split)
        for start in range(0, len(images), _EVALUATION_BATCH_SIZE):
            chosen = slice(start, start + _EVALUATION_BATCH_SIZE)
            yield {"images": images[chosen], "keypoints": keypoints[chosen]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The number of labelled keypoints that are found, and the sum over them of the mean squared error."""
        del model_state
        heatmaps: Any = self.model.apply({"params": params}, _scale(batch["images"]))
        height, width = heatmaps.shape[1:3]
        places, is_labelled = batch["keypoints"][..., :2], batch["keypoints"][..., 2] > 0
        distances = jnp.linalg.norm(highest_places(heatmaps) - places, axis=-1)
        is_found = distances <= self.radius * max(height, width)
        errors = jnp.mean((heatmaps - gaussian_heatmaps(places, height, width, self.sigma)) ** 2, axis=(1, 2))
        count = jnp.sum(is_labelled, dtype=jnp.float32)
        return {
            "pck": (jnp.sum(is_found & is_labelled, dtype=jnp.float32), count),
            "mse": (jnp.sum(errors, where=is_labelled), count),
        }


def _scale(images: Any) -> jax.Array:
    """Images in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) * (2 / 255) - 1


def gaussian_heatmaps(places: jax.Array, height: int, width: int, sigma: float) -> jax.Array:
    """Heatmaps that are 1 at a place and fall off around it like a Gaussian.

    Args:
      places: `[n, num_keypoints, 2]`, x and y in pixels; the middle of the first pixel is at 0.5.
      height: of the heatmaps.
      width: of the heatmaps.
      sigma: the Gaussian's, in pixels.

    Returns:
      `[n, height, width, num_keypoints]` float32.
    """
    x, y = places[:, None, None, :, 0], places[:, None, None, :, 1]
    columns, rows = jnp.arange(width)[None, None, :, None] + 0.5, jnp.arange(height)[None, :, None, None] + 0.5
    return jnp.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))


def highest_places(heatmaps: jax.Array) -> jax.Array:
    """Where heatmaps are highest.

    Args:
      heatmaps: `[n, height, width, num_keypoints]`.

    Returns:
      `[n, num_keypoints, 2]` float32, x and y as of `gaussian_heatmaps`.
    """
    number, height, width, num_keypoints = heatmaps.shape
    y, x = jnp.divmod(jnp.argmax(heatmaps.reshape(number, height * width, num_keypoints), axis=1), width)
    return jnp.stack([x, y], axis=-1) + 0.5


def load_pose_estimation(
    data_dir: Path, *, dataset: str, model: Callable[[int], nn.Module], batch_size: int
) -> PoseEstimation:
    """The task of finding the keypoints of a data set of the table.

    Args:
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
      dataset: the name of the data set.
      model: makes the model, given the number of keypoints.
      batch_size: as in `PoseEstimation`.

    Raises:
      UsageError: if the data set is missing, not known or has no keypoints.
    """
    poses = load_poses(dataset, data_dir)
    return PoseEstimation(dataset=poses, model=model(poses.num_keypoints), batch_size=batch_size)


TASKS: dict[str, Callable[[Path], Task]] = {
    # As in the paper, the heatmaps have 64 rows of 48 pixels; the images, which have 256 of 192 there, do so here.
    "coco-pose-unet": functools.partial(
        load_pose_estimation,
        dataset="coco-pose",
        model=functools.partial(SegmentationUNet, features=(8, 16, 32)),
        batch_size=64,
    ),
}
