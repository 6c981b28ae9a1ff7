"""Folders that TensorFlow Datasets prepares, with a few images of random numbers in them."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


def write_prepared(
    data_dir: Path,
    name: str,
    version: str,
    splits: Mapping[str, int],
    sizes: Sequence[tuple[int, int, int]],
    *,
    num_classes: int | None = None,
) -> None:
    """Prepares a data set with the writer of TensorFlow Datasets itself.

    Args:
      data_dir: the folder of prepared data sets.
      name: of the data set, with its configuration, if any.
      version: of the data set.
      splits: the number of examples of each split.
      sizes: of images, one after another: height, width and channels.
      num_classes: number of different labels, or `None` for 17 keypoints in place of labels.
    """
    import tensorflow_datasets as tfds

    folder, _, config = name.partition("/")
    shape = sizes[0] if len(sizes) == 1 else (None, None, sizes[0][-1])
    features: dict[str, Any] = {"image": tfds.features.Image(shape=shape)}
    if num_classes is None:
        features["keypoints"] = tfds.features.Tensor(shape=(17, 3), dtype=np.float32)
    else:
        features["label"] = tfds.features.ClassLabel(num_classes=num_classes)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(number) for split, number in splits.items()}

        def _generate_examples(self, number: int) -> Any:
            rng = np.random.default_rng(number)
            for index in range(number):
                size = sizes[index % len(sizes)]
                example: dict[str, Any] = {"image": _png(rng.integers(256, size=size, dtype=np.uint8))}
                if num_classes is None:
                    keypoints = rng.uniform(size=[17, 3]) * [size[1], size[0], 2]
                    example["keypoints"] = np.concatenate([keypoints[:, :2], np.rint(keypoints[:, 2:])], axis=1).astype(
                        np.float32
                    )
                else:
                    example["label"] = index % num_classes
                yield index, example

    # There is nothing to download, and no file of checksums beside this one.
    Builder.name, Builder.url_infos = folder, {}
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _png(image: np.ndarray) -> bytes:
    # TensorFlow would have to encode an array.
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()
