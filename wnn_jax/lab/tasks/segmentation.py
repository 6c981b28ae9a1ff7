"""Segmentation: the class of every pixel of an image."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.tasks.data import ImageDataset, LabeledImages, load_images
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import SegmentationUNet
from wnn_jax.lab.tasks.task import Metric, Sums, Task

_SIZE = 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation(ImageClassification):
    """Training of a network to classify every pixel of an image, by the mean cross entropy of a pixel.

    Attributes:
      dataset: images, whose labels are of their pixels, `[n, height, width]`.
      model: maps images `[n, height, width, channels]` to logits `[n, height, width, num_classes]`.
      batch_size: images per step.
      augment: changes the training images, or `None`. It must leave every pixel where it is, because labels stay.
      training_examples: as in `ImageClassification`.

    Raises:
      UsageError: as `ImageClassification` does.
    """

    @classmethod
    def load(cls, data_dir: Path, *, dataset: str, **options: Any) -> Self:
        """The task on scenes that `compose_scenes` makes of a data set of the table. Otherwise as `ImageTask.load`."""
        return cls(dataset=compose_scenes(load_images(dataset, data_dir)), **options)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean intersection over union, the share of pixels that are classified right, and the cross entropy.

        The intersection over union of a class is of all pixels of a split together. Its mean is over the classes that
        some pixel of the split has or is taken for.
        """
        return (Metric("mIoU", higher_is_better=True, from_mean=np.nanmean, format=".2%"), *super().metrics)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {**super().describe(), "kind": "segmentation"}

    def _sums(self, logits: jax.Array, labels: jax.Array) -> Sums:
        """What `measure` returns: also the intersection and the union of every class, `[num_classes]`."""
        predicted, true = (
            jax.nn.one_hot(classes, self.dataset.num_classes, dtype=bool)
            for classes in (jnp.argmax(logits, axis=-1), labels)
        )
        intersection, union = (
            jnp.sum(pixels, axis=(0, 1, 2), dtype=jnp.float32) for pixels in (predicted & true, predicted | true)
        )
        return {"mIoU": (intersection, union), **super()._sums(logits, labels)}


def compose_scenes(
    digits: ImageDataset, *, num_train: int = 8_000, num_validation: int = 500, num_test: int = 1_000
) -> ImageDataset:
    """Makes synthetic images of one to three digits each, on a textured ground.

    The digits have random places, sizes of 8 to 12 pixels and brightnesses; later ones cover earlier ones. The ground
    is smooth noise of random contrast, with some noise of single pixels. Images of a split have digits of that split.

    Args:
      digits: grey images of one digit each, with a margin of a seventh of the width, as those of MNIST.
      num_train: how many images to make of the training set.
      num_validation: the same of the validation split.
      num_test: the same of the test split.

    Returns:
      Images `[n, 20, 20, 1]`, with labels `[n, 20, 20]`: 0 for the ground, and one more than that of the digit where
      at least a third of a pixel is ink. They are always the same.
    """
    numbers = {"train": num_train, "validation": num_validation, "test": num_test}
    splits = {
        split: _compose(np.random.default_rng(seed), getattr(digits, split), digits.max_value, number)
        for seed, (split, number) in enumerate(numbers.items())
    }
    return ImageDataset(name=f"{digits.name} scenes", **splits, num_classes=digits.num_classes + 1, max_value=255)


def _compose(rng: np.random.Generator, digits: LabeledImages, max_value: int, number: int) -> LabeledImages:
    scenes = np.empty([number, _SIZE, _SIZE], np.float32)
    classes = np.zeros([number, _SIZE, _SIZE], np.int32)
    width = digits.images.shape[1]
    core = slice(width // 7, width - width // 7)
    for scene, pixels in zip(scenes, classes, strict=True):
        scene[:] = rng.uniform(0, 0.4) + rng.uniform(0.1, 0.4) * _resize(rng.uniform(size=[4, 4]), _SIZE)
        for index in rng.integers(len(digits.labels), size=rng.integers(1, 4)):
            size = int(rng.integers(8, 13))
            top, left = rng.integers(_SIZE - size + 1, size=2)
            place = slice(top, top + size), slice(left, left + size)
            ink = _resize(digits.images[index, core, core, 0] / max_value, size)
            scene[place] += ink * (rng.uniform(0.7, 1) - scene[place])
            pixels[place] = np.where(ink >= 1 / 3, digits.labels[index] + 1, pixels[place])
        scene += rng.normal(0, 0.05, scene.shape)
    return LabeledImages((scenes.clip(0, 1) * 255).astype(np.uint8)[..., None], classes)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """A square image in [0, 1] at another size, `[size, size]` float32."""
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(image.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BILINEAR))


TASKS: dict[str, Callable[[Path], Task]] = {
    # The U-Net works at 20x20, 10x10 and 5x5.
    "mnist-segmentation": functools.partial(
        Segmentation.load, dataset="mnist", model=SegmentationUNet(11, features=(8, 16, 32)), batch_size=16
    ),
}
