"""Data sets of people in images, with the places of their joints."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks.data.digest import arrays_digest
from wnn_jax.meta.tasks.data.prepared import read_prepared

_COCO_HEIGHT, _COCO_WIDTH = 64, 48

# What a builder of `coco_pose` has to make; TensorFlow Datasets has none with the keypoints of COCO.
COCO_POSE_BUILDER = (
    "'coco_pose' is a builder of your own (tfds.core.GeneratorBasedBuilder), with splits 'train' and 'validation' and "
    "one example for every annotated person: 'image', tfds.features.Image(shape=(None, None, 3)), the person's box; "
    "'keypoints', tfds.features.Tensor(shape=(17, 3), dtype=np.float32), x and y in pixels of it and COCO's visibility."
)


class Poses(NamedTuple):
    """Examples.

    Attributes:
      images: `[n, height, width, 3]` uint8, one person each.
      keypoints: `[n, num_keypoints, 3]` float32: x and y in pixels from the upper left corner of the image, and the
        visibility, which is 0 where a keypoint is not labelled.
    """

    images: np.ndarray
    keypoints: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PoseDataset:
    """Images of one person each, with keypoints such as elbows and knees.

    Attributes:
      name: as in the table of data sets.
      train: what is trained on.
      validation: held out of the original training set; targets are read on these.
      test: for one score at the end.
    """

    name: str
    train: Poses
    validation: Poses
    test: Poses

    @property
    def num_keypoints(self) -> int:
        """The number of keypoints of a person."""
        return self.train.keypoints.shape[1]

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of everything in the data set but its name."""
        return arrays_digest(*self.train, *self.validation, *self.test)


def load_coco_pose(data_dir: Path) -> PoseDataset:
    """The people of COCO (Lin et al., ECCV 2014), resized to 64 rows of 48 pixels, with 17 keypoints each.

    The last thirtieth of the training set is for validation; the original validation set, whose labels are public, is
    the test set. `COCO_POSE_BUILDER` says what has to be prepared.

    Raises:
      UsageError: if the keypoints are not of the shape `[17, 3]`, or as `read_prepared` does.
    """
    train, test = _read("train", data_dir), _read("validation", data_dir)
    start = len(train.images) - round(len(train.images) / 30)
    return PoseDataset(
        name="coco-pose",
        train=Poses(train.images[:start], train.keypoints[:start]),
        validation=Poses(train.images[start:], train.keypoints[start:]),
        test=test,
    )


def _read(split: str, data_dir: Path) -> Poses:
    from PIL import Image

    source: Any = read_prepared("coco_pose", split, data_dir, features=("image", "keypoints"))
    shape = source.dataset_info.features["keypoints"].shape
    if shape != (17, 3):
        raise UsageError(f"{data_dir / 'coco_pose'} has keypoints of the shape {list(shape)}, not [17, 3].")
    images = np.empty([len(source), _COCO_HEIGHT, _COCO_WIDTH, 3], np.uint8)
    keypoints = np.empty([len(source), *shape], np.float32)
    for index, example in enumerate(source):
        height, width, _ = example["image"].shape
        resized = Image.fromarray(example["image"]).resize((_COCO_WIDTH, _COCO_HEIGHT), Image.Resampling.BILINEAR)
        images[index] = np.asarray(resized)
        keypoints[index] = example["keypoints"] * np.array([_COCO_WIDTH / width, _COCO_HEIGHT / height, 1], np.float32)
    return Poses(images, keypoints)
