"""What the tasks on images have in common."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import flax.linen as nn

from wnn_jax.lab.tasks.data import ImageDataset, batch_indices, check_batch_size, load_images
from wnn_jax.lab.tasks.models import describe_model
from wnn_jax.lab.tasks.task import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageTask:
    """A network, and the images that it is trained on.

    Attributes:
      dataset: images with labels.
      model: what is trained.
      batch_size: images per step.

    Raises:
      UsageError: if there are fewer training images than a batch has.
    """

    dataset: ImageDataset
    model: nn.Module
    batch_size: int

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.dataset.train.images))

    @classmethod
    def load(cls, data_dir: Path, *, dataset: str, **options: Any) -> Self:
        """The task on a data set of the table.

        Args:
          data_dir: the folder of data sets prepared by TensorFlow Datasets.
          dataset: the name of the data set.
          **options: the other attributes.

        Raises:
          UsageError: if the data set is missing, not known or no set of images.
        """
        return cls(dataset=load_images(dataset, data_dir), **options)

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
