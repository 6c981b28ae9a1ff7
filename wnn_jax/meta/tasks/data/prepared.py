"""Reading of data sets that TensorFlow Datasets has prepared, without TensorFlow."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_prepared(name: str, split: str, data_dir: Path) -> Iterable[Any]:
    """The examples of a split, a mapping from names to arrays each."""
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # There would be a warning that OpenCV is faster than Pillow.
    return tfds.data_source(name, split=split, data_dir=data_dir)
