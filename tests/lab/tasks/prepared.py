"""Folders that TensorFlow Datasets prepares, with a few random images in them."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


def write_prepared(
    data_dir: Path, name: str, version: str, splits: Mapping[str, int], shape: tuple[int, ...], num_classes: int
) -> None:
    """Prepare a data set of random images with the writer of TensorFlow Datasets itself."""
    import tensorflow_datasets as tfds

    folder, _, config = name.partition("/")
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }

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
                image = _png(rng.integers(256, size=shape, dtype=np.uint8))
                yield index, {"image": image, "label": index % num_classes}

    # There is nothing to download, and no file of checksums.
    Builder.name, Builder.url_infos = folder, {}
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _png(image: np.ndarray) -> bytes:
    # TensorFlow would have to encode an array.
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()
