"""Reading of data sets that TensorFlow Datasets has prepared, without TensorFlow."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wnn_jax.lab.errors import UsageError


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether a data set is there, in any version.

    Args:
      name: as in TensorFlow Datasets, with its configuration, if any: `imagenet_resized/64x64`.
      data_dir: the folder of prepared data sets.
    """
    return any((data_dir / name).glob("*/dataset_info.json"))


def read_prepared(name: str, split: str, data_dir: Path, features: Iterable[str] = ()) -> Any:
    """The examples of a split.

    Args:
      name: as in TensorFlow Datasets.
      split: the part of it.
      data_dir: the folder of prepared data sets.
      features: what every example has to have.

    Returns:
      A sequence of mappings from names to arrays, which are decoded when they are asked for. Its `dataset_info` says
      more about them.

    Raises:
      UsageError: if the folder is of another format or version, or has no such split or features.
    """
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # There would be a warning that OpenCV is faster than Pillow.
    try:
        source: Any = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        raise UsageError(
            f"{data_dir / name} cannot be read ({reason}); prepare it once more, with a split {split!r} and "
            "file_format='array_record'."
        ) from error
    if missing := [feature for feature in features if source[0].get(feature) is None]:
        raise UsageError(
            f"the examples of {data_dir / name} have no {' and no '.join(map(repr, missing))}; prepare it once more, "
            "with that feature."
        )
    return source
