"""Segmentation: the class of every pixel of an image."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.tasks.data.datasets import ImageDataset, LabeledImages
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.task import Metric, Sums

_SIZE = 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation(ImageClassification):
    """A network learns to classify every pixel of an image, by the mean cross entropy of a pixel.

    Labels are `[n, height, width]`, and the model returns logits `[n, height, width, num_classes]`. Labels do not
    change with the images, so `augment` must leave every pixel in its place. Intersection and union of a class are
    summed over all pixels of a split. Their mean is over the classes that some pixel has, or is taken for.
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("mIoU", higher_is_better=True, from_mean=np.nanmean, format=".2%"), *super().metrics)

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "kind": "segmentation"}

    def _sums(self, logits: jax.Array, labels: jax.Array) -> Sums:
        predicted, true = (
            jax.nn.one_hot(classes, self.dataset.num_classes, dtype=bool)
            for classes in (jnp.argmax(logits, axis=-1), labels)
        )
        intersection, union = (
            jnp.sum(pixels, axis=(0, 1, 2), dtype=jnp.float32) for pixels in (predicted & true, predicted | true)
        )
        return {"mIoU": (intersection, union), **super()._sums(logits, labels)}


def compose_scenes(digits: ImageDataset, sizes: tuple[int, int, int] = (8_000, 500, 1_000)) -> ImageDataset:
    """Make synthetic images of one to three digits each, on a textured ground. They are always the same.

    The digits have random places, sizes of 8 to 12 pixels and brightnesses. Later digits cover earlier ones. The ground
    is smooth noise of random contrast, with some noise of single pixels. A split has as many images as `sizes` says,
    `[n, 20, 20, 1]`, of digits of the same split, with a margin of a seventh of the width. In labels `[n, 20, 20]` the
    ground is 0. A pixel that is at least a third ink is one more than its digit.
    """
    splits = {
        split: _compose(np.random.default_rng(seed), getattr(digits, split), digits.max_value, sizes[seed])
        for seed, split in enumerate(("train", "validation", "test"))
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
    """Resize a square image in [0, 1] to `[size, size]` float32."""
    import PIL.Image

    return np.asarray(PIL.Image.fromarray(image.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BILINEAR))
