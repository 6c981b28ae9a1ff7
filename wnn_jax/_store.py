"""Saving nowcasters, and finding them again by name or by path."""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from wnn_jax._files import replace_on_success
from wnn_jax._nowcaster import DriftNowcaster, Nowcaster
from wnn_jax.nowcasters import CLASSES, RULES

# What `nowcast` uses by default: of the bundled ones, that which saves most training.
DEFAULT_NOWCASTER = "drift"

_FORMAT = "wnn_jax.nowcaster"
_VERSION = 1
# What reading a damaged archive can raise, from the zip directory down to an array's header and its data.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def available() -> tuple[str, ...]:
    """The names that `load` and `nowcast` know: bundled networks first, then the rules without weights.

    Examples:
      >>> import wnn_jax
      >>> "linear" in wnn_jax.available()
      True
    """
    return (*sorted(path.stem for path in _bundled_folder().glob("*.npz")), *RULES)


def load(name_or_path: str | os.PathLike[str] = DEFAULT_NOWCASTER) -> Nowcaster | DriftNowcaster:
    """Loads a nowcaster.

    Args:
      name_or_path: a name from `available()`, or the path of a file that `save` wrote. Default: the one that
        `nowcast` uses by default.

    Returns:
      The nowcaster.

    Raises:
      ValueError: if the name is unknown, or the file is damaged, of another program, or of a newer version.
      FileNotFoundError: if there is no file at the path.

    Examples:
      >>> import wnn_jax
      >>> wnn_jax.load("quadratic").context
      5
    """
    name = os.fspath(name_or_path)
    if name in RULES:
        return RULES[name]
    if name in available():
        return _read(_bundled_folder() / f"{name}.npz")
    path = Path(name_or_path)
    if path.is_file():
        return _read(path)
    if path.suffix == ".npz" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no nowcaster file at {name!r}; wnn_jax.save writes such files.")
    raise ValueError(
        f"nowcaster={name!r} is not known. Known names: {', '.join(available())}. For a file, give its path."
    )


def save(nowcaster: Nowcaster | DriftNowcaster, path: str | os.PathLike[str]) -> None:
    """Saves a nowcaster as one `.npz` file, without pickle.

    The file holds the weights under path-like names, and as JSON its format's version, the nowcaster's class,
    context, roles and settings, and the record of its training. It is written to a temporary name and then
    moved, so that an interrupted call leaves what was there.

    Args:
      nowcaster: of one of the classes of `wnn_jax.nowcasters`.
      path: where to write, by custom ending in `.npz`.

    Raises:
      ValueError: if `nowcaster` is of a class that cannot be saved.
      TypeError: if its record is not made of what JSON has.

    Examples:
      >>> import tempfile, pathlib
      >>> import jax
      >>> import wnn_jax
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "untrained.npz"
      >>> wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0)), path)
      >>> sorted(wnn_jax.load(path).params)
      ['bias', 'conv', 'dense']
    """
    content = _content(nowcaster, "saved")
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "class": content.class_name,
        "context": getattr(nowcaster, "context", None),
        "roles": content.roles,
        "settings": content.settings,
    }
    try:
        metadata_json = json.dumps(metadata)
    except TypeError as error:
        raise TypeError(
            f"nowcaster.record cannot be saved: {error}. Make it of dicts, lists, strings, numbers, booleans and None."
        ) from error
    arrays = {f"params/{name}": array for name, array in content.params.items()}
    with replace_on_success(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, metadata=np.array(metadata_json), **arrays)  # pyright: ignore[reportArgumentType]


def fingerprint(nowcaster: Nowcaster | DriftNowcaster) -> str:
    """Tells whether two nowcasters are the same, without having both.

    Args:
      nowcaster: of one of the classes of `wnn_jax.nowcasters`.

    Returns:
      A SHA-256 in hexadecimal digits over the nowcaster's class, its settings without the record of its training, and
      all its weights. It is the same for a nowcaster that was saved and loaded again.

    Raises:
      ValueError: if `nowcaster` is of another class: what a function does cannot be told from its data.
    """
    content = _content(nowcaster, "given a fingerprint")
    settings = {name: value for name, value in content.settings.items() if name != "record"}
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        # With its length, so that no part can be taken for the end of another.
        digest.update(len(part).to_bytes(8, "little") + part)

    add(json.dumps([content.class_name, settings], sort_keys=True).encode())
    for name, array in sorted(content.params.items()):
        add(json.dumps([name, array.shape, array.dtype.name]).encode())
        add(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


class _Content(NamedTuple):
    """What makes a nowcaster.

    Attributes:
      class_name: the name of its class in `wnn_jax.nowcasters.CLASSES`.
      roles: the roles that it forecasts.
      settings: its fields without the weights.
      params: its weights, by path-like names.
    """

    class_name: str
    roles: list[str]
    settings: dict[str, Any]
    params: dict[str, np.ndarray]


def _content(nowcaster: Any, purpose: str) -> _Content:
    name = type(nowcaster).__name__
    # A subclass is another class, even of the same name: it could not be made again.
    if CLASSES.get(name) is not type(nowcaster):
        raise ValueError(
            f"nowcaster={nowcaster!r} cannot be {purpose}: its class is none of {', '.join(CLASSES)}. A nowcaster made "
            "from a function (wnn_jax.leafwise) is code; keep it in a module."
        )
    settings = {field.name: getattr(nowcaster, field.name) for field in dataclasses.fields(nowcaster)}
    params = flax.traverse_util.flatten_dict(dict(settings.pop("params", {})), sep="/")
    return _Content(name, list(nowcaster.roles), settings, {path: _portable(leaf) for path, leaf in params.items()})


def _read(path: Path) -> Nowcaster | DriftNowcaster:
    try:
        # A file that we open is closed whatever happens; one that `np.load` opens stays open if it is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        metadata = json.loads(str(content.pop("metadata")))
        is_ours = metadata["format"] == _FORMAT
        version = int(metadata["version"])
    except _DAMAGE as error:
        raise ValueError(
            f"{path} cannot be read as a nowcaster: it is damaged, or wnn_jax.save did not write it ({error!r})."
        ) from error
    if not is_ours:
        raise ValueError(f"{path} is not a nowcaster: its format is {metadata['format']!r}, not {_FORMAT!r}.")
    if version > _VERSION:
        raise ValueError(
            f"{path} has format version {version}, but this wnn_jax reads up to {_VERSION}; upgrade wnn_jax to load it."
        )
    try:
        cls = CLASSES[metadata["class"]]
        params = {name.removeprefix("params/"): jnp.asarray(array) for name, array in content.items()}
        settings = metadata["settings"]
        if params:
            settings["params"] = flax.traverse_util.unflatten_dict(params, sep="/")
        return cls(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: what it holds makes no nowcaster ({error}).") from error


def _portable(array: Any) -> np.ndarray:
    # A `.npy` file has no name for bfloat16.
    return np.asarray(array, jnp.promote_types(array.dtype, jnp.float32))


def _bundled_folder() -> Path:
    """`params/` of the repository, which a wheel carries inside the package."""
    package = Path(__file__).parent
    inside = package / "params"
    return inside if inside.is_dir() else package.parent / "params"
