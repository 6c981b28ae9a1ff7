"""Arrays with a header in one file. Replace this module by the store that the whole package uses."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wnn_jax._files import replace_on_success


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write arrays and a JSON header to one file with a checksum, whole or not at all."""
    text = json.dumps({"header": header, "sha256": _sha256(header, arrays)}, allow_nan=False)
    with replace_on_success(path) as temporary, temporary.open("wb") as file:
        np.savez(file, header=np.array(text), **arrays)  # pyright: ignore[reportArgumentType]


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of a file. A damaged file raises a `ValueError` of one line."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        content = json.loads(str(arrays.pop("header")))
        if content["sha256"] != _sha256(content["header"], arrays):
            raise ValueError("its checksum does not match its content")
        return content["header"], arrays
    except (ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}.") from error


def _sha256(header: Any, arrays: Mapping[str, np.ndarray]) -> str:
    described = {name: [array.shape, array.dtype.str] for name, array in sorted(arrays.items())}
    digest = hashlib.sha256(json.dumps([header, described], sort_keys=True).encode())
    for _, array in sorted(arrays.items()):
        digest.update(array.tobytes())
    return digest.hexdigest()
