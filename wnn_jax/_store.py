"""Save nowcasters, and load them by name or by path."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from wnn_jax._drift import Drift
from wnn_jax._files import checksum, explain_damage, read_arrays, write_arrays
from wnn_jax._window import Nowcaster
from wnn_jax.nowcasters import CLASSES, RULES

# The default of `nowcast`: the nowcaster that saves most steps.
DEFAULT_NOWCASTER = "drift"

_FORMAT, _VERSION = "wnn_jax.nowcaster", 2
_REMOVED = ("AdaptiveLinear", "Introspection", "LearnedDrift", "Pooled")
_REMEDY = "Copy it again from an intact copy, or save the nowcaster again."


def available() -> tuple[str, ...]:
    """Return the names that `load` and `nowcast` know: bundled networks first, then the rules without weights.

    Examples:
      >>> import wnn_jax
      >>> "linear" in wnn_jax.available()
      True
    """
    return (*sorted(path.stem for path in _bundled_folder().glob("*.npz")), *RULES)


def load(name_or_path: str | os.PathLike[str] = DEFAULT_NOWCASTER) -> Nowcaster | Drift:
    """Load a nowcaster by name or from a file, with every weight and setting that was saved.

    Args:
      name_or_path: a name from `available()`, or the path of a file that `save` wrote. Default: the nowcaster that
        `nowcast` uses by default.

    Raises:
      ValueError: if the name is unknown; if the file is damaged, or of another program or version; if its weights are
        float64 and JAX's 64-bit mode is off.
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


def save(nowcaster: Nowcaster | Drift, path: str | os.PathLike[str]) -> None:
    """Save a nowcaster as one `.npz` file, without pickle; an interrupted call leaves the old file as it was.

    The file holds the weights under path-like names. A JSON header holds the class, the context, the roles, the
    settings with the record of the training, and a checksum.

    Args:
      nowcaster: an instance of a class of `wnn_jax.nowcasters`.
      path: where to write; its name should end in `.npz`.

    Raises:
      ValueError: if the class cannot be saved, a weight is not a finite float, or a number of the record is not finite.
      TypeError: if the record is not made of what JSON has.

    Examples:
      >>> import tempfile, pathlib
      >>> import jax
      >>> import wnn_jax
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "untrained.npz"
      >>> wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0)), path)
      >>> sorted(wnn_jax.load(path).params)
      ['bias', 'conv', 'dense']
    """
    header, params = _content(nowcaster, "saved")
    arrays = {f"params/{name}": array for name, array in params.items()}
    _check_weights(arrays)
    try:
        json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"nowcaster.record cannot be saved: {error}. Make it of dicts, lists, strings, finite numbers, booleans "
            "and None."
        ) from error
    write_arrays(Path(path), arrays, {"format": _FORMAT, "version": _VERSION, **header})


def fingerprint(nowcaster: Nowcaster | Drift) -> str:
    """Return a SHA-256 of a nowcaster's class, weights and settings, without the record of its training."""
    header, params = _content(nowcaster, "given a fingerprint")
    settings = {name: value for name, value in header["settings"].items() if name != "record"}
    return checksum([header["class"], settings], params)


def _content(nowcaster: Any, purpose: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a header with a nowcaster's class and settings, and its weights by path-like names."""
    name = type(nowcaster).__name__
    # A subclass cannot be restored, even if it has the same name.
    if CLASSES.get(name) is not type(nowcaster):
        raise ValueError(
            f"nowcaster={nowcaster!r} cannot be {purpose}: its class is none of {', '.join(CLASSES)}. A nowcaster made "
            "from a function (wnn_jax.leafwise) is code; keep it in a module."
        )
    settings = {field.name: getattr(nowcaster, field.name) for field in dataclasses.fields(nowcaster)}
    params = flax.traverse_util.flatten_dict(dict(settings.pop("params", {})), sep="/")
    context, roles = getattr(nowcaster, "context", None), list(nowcaster.roles)
    header = {"class": name, "context": context, "roles": roles, "settings": settings}
    return header, {path: _portable(leaf) for path, leaf in params.items()}


def _read(path: Path) -> Nowcaster | Drift:
    header, arrays = read_arrays(path, format_name=_FORMAT, version=_VERSION, remedy=_REMEDY)
    name = header.get("class")
    if name in _REMOVED and name not in CLASSES:
        raise ValueError(
            f"{path} holds a nowcaster of the class {name!r}, which this wnn_jax no longer has: wnn_jax 0.2.0.dev0 "
            "reads it."
        )
    with explain_damage(path, _REMEDY):
        _check_weights(arrays)
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    if any(weights[name].dtype != array.dtype for name, array in arrays.items()):
        raise ValueError(
            f"{path} has weights in float64, which JAX would round to float32. Set jax_enable_x64 to load it as it is, "
            "or save it in float32."
        )
    with explain_damage(path, _REMEDY):
        params = flax.traverse_util.unflatten_dict(weights, sep="/")
        nowcaster = CLASSES[header["class"]](**header["settings"], **params)
        actual, _ = _content(nowcaster, "read")
        for key in ("context", "roles"):
            if header[key] != actual[key]:
                raise ValueError(f"its {key} is {header[key]!r}, but its nowcaster has {key}={actual[key]!r}")
        return nowcaster


def _check_weights(arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.name not in ("float32", "float64") or not np.isfinite(array).all():
            raise ValueError(f"{name}, of {array.dtype}, must have finite floats only: the weights of a nowcaster.")


def _portable(array: Any) -> np.ndarray:
    """Return the array for a file or a fingerprint: floats in float32 at least, little-endian."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.promote_types(dtype, jnp.float32)
    return np.asarray(array, np.dtype(dtype).newbyteorder("<"), order="C")


def _bundled_folder() -> Path:
    """Return the repository's `params/`, which a wheel carries inside the package."""
    inside = Path(__file__).parent / "params"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "params"
