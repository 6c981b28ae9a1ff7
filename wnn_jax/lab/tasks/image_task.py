"""What all tasks on images share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from wnn_jax.lab.tasks.data import ImageDataset, batch_indices, check_batch_size
from wnn_jax.lab.tasks.models import describe_model
from wnn_jax.lab.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageTask:
    """A network and the images that it is trained on.

    Attributes:
      dataset: images with labels.
      model: the network to train.
      batch_size: images per step.

    Raises:
      UsageError: if the batch size is not positive or exceeds the number of training images.
    """

    dataset: ImageDataset
    model: nn.Module
    batch_size: int

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.dataset.train.images))

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {
            "dataset": {"name": self.dataset.name, "sha256": self.dataset.digest},
            "model": describe_model(self.model),
            "batch_size": self.batch_size,
        }

    def batch(self, seed: int, step: int) -> Batch:
        """Images `[batch_size, height, width, channels]` uint8."""
        images = self.dataset.train.images
        return {"images": images[batch_indices(seed, step, num_examples=len(images), batch_size=self.batch_size)]}
