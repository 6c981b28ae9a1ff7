"""Saving nowcasters, and finding them again by name or by path."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import is_int
from wnn_jax._drift import Drift
from wnn_jax._files import replace_on_success
from wnn_jax._window import Nowcaster
from wnn_jax.nowcasters import CLASSES, RULES

# What `nowcast` uses by default: of the bundled ones, that which saves most training.
DEFAULT_NOWCASTER = "drift"

_FORMAT = "wnn_jax.nowcaster"
_VERSION = 2
# A `.npy` file of text or of floats, up to its data, as NumPy writes it. NumPy's own reader is not for damaged files:
# it warns, raises what is no `ValueError`, and makes room for whatever size it reads.
_ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..{'descr': '(?P<dtype><f[48]|<U\d{1,9})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[\d, ]{,99})\), } *\n",
    re.DOTALL,
)


def available() -> tuple[str, ...]:
    """The names that `load` and `nowcast` know: bundled networks first, then the rules without weights.

    Examples:
      >>> import wnn_jax
      >>> "linear" in wnn_jax.available()
      True
    """
    return (*sorted(path.stem for path in _bundled_folder().glob("*.npz")), *RULES)


def load(name_or_path: str | os.PathLike[str] = DEFAULT_NOWCASTER) -> Nowcaster | Drift:
    """Loads a nowcaster.

    Args:
      name_or_path: a name from `available()`, or the path of a file that `save` wrote. Default: the one that
        `nowcast` uses by default.

    Returns:
      The nowcaster, every weight and setting as it was saved.

    Raises:
      ValueError: if the name is unknown, or the file is damaged, of another program, or of another version, or has
        weights in float64 and JAX's 64-bit mode is off.
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
    """Saves a nowcaster as one `.npz` file, without pickle.

    The file holds the weights under path-like names, and as JSON its format's version, the nowcaster's class,
    context, roles and settings, the record of its training, and a checksum of all this. It is written to a
    temporary name and then moved, so that an interrupted call leaves what was there.

    Args:
      nowcaster: of one of the classes of `wnn_jax.nowcasters`.
      path: where to write, by custom ending in `.npz`.

    Raises:
      ValueError: if `nowcaster` is of a class that cannot be saved, or has weights that are no finite floats, or a
        record with numbers that are not finite.
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
    arrays = {f"params/{name}": array for name, array in content.params.items()}
    _check_weights(arrays)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "class": content.class_name,
        "context": getattr(nowcaster, "context", None),
        "roles": content.roles,
        "settings": content.settings,
    }
    try:
        metadata = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"nowcaster.record cannot be saved: {error}. Make it of dicts, lists, strings, finite numbers, booleans "
            "and None."
        ) from error
    _write(Path(path), metadata, arrays)


def fingerprint(nowcaster: Nowcaster | Drift) -> str:
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
    return _sha256([content.class_name, settings], content.params)


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


def _write(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    text = json.dumps({**metadata, "sha256": _sha256(metadata, arrays)})
    with replace_on_success(path) as temporary, temporary.open("wb") as file:
        np.savez(file, metadata=np.array(text), **arrays)  # pyright: ignore[reportArgumentType]


def _read(path: Path) -> Nowcaster | Drift:
    content = path.read_bytes()
    with _damage_named(path):
        members = _members(content)
        metadata = json.loads(str(_array(members.pop("metadata"))))
        file_format, version = metadata["format"], metadata["version"]
        if not is_int(version) or version < 1:
            raise ValueError(f"its version is {version!r}")
    if file_format != _FORMAT:
        raise ValueError(f"{path} is not a nowcaster: its format is {file_format!r}, not {_FORMAT!r}.")
    if version != _VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, but this wnn_jax reads version {_VERSION}. Use the wnn_jax that "
            "wrote it (upgrade, if that is a newer one), or make the nowcaster again."
        )
    with _damage_named(path):
        arrays = {name: _array(member) for name, member in members.items()}
        if metadata.pop("sha256") != _sha256(metadata, arrays):
            raise ValueError("its content is not that of its checksum")
        _check_weights(arrays)
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    if any(weights[name].dtype != array.dtype for name, array in arrays.items()):
        raise ValueError(
            f"{path} has weights in float64, which JAX would round to float32. Set jax_enable_x64 to load it as it is, "
            "or save it in float32."
        )
    with _damage_named(path):
        params = flax.traverse_util.unflatten_dict(weights, sep="/")
        nowcaster = CLASSES[metadata["class"]](**metadata["settings"], **params)
        if (context := getattr(nowcaster, "context", None)) != metadata["context"]:
            raise ValueError(f"its context is {metadata['context']!r}, but its nowcaster has context={context}")
        if list(nowcaster.roles) != metadata["roles"]:
            raise ValueError(f"its roles are {metadata['roles']!r}, but its nowcaster has {list(nowcaster.roles)}")
        return nowcaster


@contextlib.contextmanager
def _damage_named(path: Path) -> Generator[None]:
    """Makes one `ValueError` of whatever reading arbitrary bytes may raise, which is no closed set."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a nowcaster: it is damaged, or wnn_jax.save did not write it "
            f"({type(error).__name__}: {error}). Copy it again from where it is whole, or save the nowcaster again."
        ) from error


def _members(content: bytes) -> dict[str, bytes]:
    """What an archive holds, which must not be compressed: it takes no more memory than the archive itself."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("it is shorter than what it holds")
        if any(member.header_offset > 0 for member in members[:1]):
            raise ValueError("something else comes before it")
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError("it holds two arrays of one name")
        # Whole, or else their checksums are not looked at.
        return {name: archive.read(member) for name, member in zip(names, members, strict=True)}


def _array(member: bytes) -> np.ndarray:
    header = _ARRAY_HEADER.match(member)
    if header is None:
        raise ValueError("an array is neither text nor of float32 or float64")
    shape = tuple(map(int, re.findall(rb"\d+", header["shape"])))
    return np.frombuffer(member, header["dtype"].decode(), offset=header.end()).reshape(shape)


def _check_weights(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.name not in ("float32", "float64") or not np.isfinite(array).all():
            raise ValueError(f"{name}, of {array.dtype}, must have finite floats only: the weights of a nowcaster.")


def _sha256(metadata: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """A SHA-256 in hexadecimal digits, over what JSON has and over arrays, whatever order they are in."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        # With its length, so that no part can be taken for the end of another.
        digest.update(len(part).to_bytes(8, "little") + part)

    add(json.dumps(metadata, sort_keys=True, allow_nan=False).encode())
    for name, array in sorted(arrays.items()):
        add(json.dumps([name, array.shape, array.dtype.name]).encode())
        add(array.tobytes())
    return digest.hexdigest()


def _portable(array: Any) -> np.ndarray:
    """The array as it is written: little-endian and in C order, floats in float32 at least."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        # A `.npy` file has no name for bfloat16.
        dtype = jnp.promote_types(dtype, jnp.float32)
    return np.asarray(array, np.dtype(dtype).newbyteorder("<"), order="C")


def _bundled_folder() -> Path:
    """`params/` of the repository, which a wheel carries inside the package."""
    package = Path(__file__).parent
    inside = package / "params"
    return inside if inside.is_dir() else package.parent / "params"
