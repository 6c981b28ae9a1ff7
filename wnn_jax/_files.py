"""Write files whole or not at all, and arrays with a checksum of their content."""

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import time
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_SECONDS_UNTIL_STALE = 2 * 24 * 60 * 60  # No write takes this long, even if the clocks of machines differ.
# The member that holds the header, and its own keys: the checksum, and dtypes that NumPy's format has no name for.
_HEADER, _CHECKSUM, _DTYPES = "metadata", "sha256", "dtypes"
_DTYPE = re.compile(r"<f[248]|<[iu][248]|\|[iub]1")
# The start of a `.npy` file, as NumPy writes it. NumPy's own reader trusts the header: a damaged one makes it warn,
# allocate whatever size it reads, and raise errors that are no `ValueError`.
_ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..{'descr': '(?P<dtype>" + _DTYPE.pattern.encode() + rb"|<U\d{1,9})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[\d, ]{,99})\), } *\n",
    re.DOTALL,
)
_REMEDY = "Copy it again from an intact copy, or make it again."


@contextlib.contextmanager
def replace_on_success(path: Path) -> Generator[Path]:
    """Yield a new, empty file in the folder of `path`, and move it to `path` once it is written.

    Threads, processes and machines may write to one path at a time, and a reader always gets one complete file. After
    an interruption, an error, a full disk or a crash, the old file is still there. A killed writer leaves its new file
    behind. The first write to the same path two days later removes it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(error.errno, f"{path.name} cannot be written: {error.strerror}", str(path.parent)) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _remove_stale(path)


def _remove_stale(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            # Another process may have removed it in the meantime.
            if name.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _SECONDS_UNTIL_STALE:
                Path(entry).unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write arrays and a header to one `.npz` file with a checksum, whole or not at all, without pickle.

    The header is made of what JSON has. Give it a `"format"` and a `"version"`, so that `read_arrays` can tell the file
    from others. The keys `"sha256"` and `"dtypes"` are taken. A `ValueError` or `TypeError` names what cannot be saved.
    """
    stored: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    for name, array in arrays.items():
        dtype: Any = array.dtype
        if dtype.name == "bfloat16":
            dtypes[name], array = dtype.name, array.view(np.uint16)
        elif not (isinstance(dtype, np.dtype) and _DTYPE.fullmatch(dtype.newbyteorder("<").str) and name != _HEADER):
            raise ValueError(
                f"{path.name} cannot hold the array {name!r} of dtype {dtype}: give booleans, integers, floats of up "
                f"to 64 bits or bfloat16 (jax.random.key_data for a random key), and no name {_HEADER!r}."
            )
        stored[name] = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    # As JSON will read it: with lists for tuples.
    content = json.loads(json.dumps({**header, **({_DTYPES: dtypes} if dtypes else {})}, allow_nan=False))
    text = np.array(json.dumps({**content, _CHECKSUM: checksum(content, stored)}))
    with replace_on_success(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in {_HEADER: text, **stored}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_arrays(
    path: Path, *, format_name: str | None = None, version: int | None = None, remedy: str = _REMEDY
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the read-only arrays that `write_arrays` wrote, compared with their checksum.

    A file that is damaged, or of another format or version, is a `ValueError` of one line. Without a `format_name`, any
    format and version will do. `remedy` says what to do about a damaged file.
    """
    content = path.read_bytes()
    with explain_damage(path, remedy):
        members = _members(content)
        header: dict[str, Any] = json.loads(str(_array(members.pop(_HEADER))))
        actual = header.get("format"), header.get("version")
    # Compare as text: in Python, True is 1, and 2.0 is 2.
    if format_name is not None and repr(actual) != repr((format_name, version)):
        raise ValueError(
            f"{path} has the format {actual[0]!r}, version {actual[1]!r}; this wnn_jax reads {format_name!r}, version "
            f"{version}, here. Use the wnn_jax that wrote the file, or make it again."
        )
    with explain_damage(path, remedy):
        arrays = {name: _array(member) for name, member in members.items()}
        if header.pop(_CHECKSUM) != checksum(header, arrays):
            raise ValueError("its content does not match its checksum")
        return header, arrays | {name: arrays[name].view(dtype) for name, dtype in header.pop(_DTYPES, {}).items()}


@contextlib.contextmanager
def explain_damage(path: Path, remedy: str = _REMEDY) -> Generator[None]:
    """Turn every error into one `ValueError` that calls the file damaged: arbitrary bytes raise errors of any kind."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path} cannot be read: it is damaged, or this wnn_jax did not write it ({reason}). {remedy}"
        ) from error


def _members(content: bytes) -> dict[str, bytes]:
    """Return the members of an archive by name. Compression is refused: they take no more memory than the archive."""
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
        # `zipfile` checks a member only if it is read as a whole.
        return {name: archive.read(member) for name, member in zip(names, members, strict=True)}


def _array(member: bytes) -> np.ndarray:
    header = _ARRAY_HEADER.match(member)
    if header is None:
        raise ValueError("it holds an array of a dtype or a layout that wnn_jax does not write")
    shape = tuple(map(int, re.findall(rb"\d+", header["shape"])))
    return np.frombuffer(member, header["dtype"].decode(), offset=header.end()).reshape(shape)


def checksum(header: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256, in hexadecimal digits, of a JSON value and of arrays by name, in any order."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        # The length keeps the end of one part and the start of the next apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(json.dumps(header, sort_keys=True, allow_nan=False).encode())
    for name, array in sorted(arrays.items()):
        add(json.dumps([name, array.shape, array.dtype.name]).encode())
        add(array.tobytes())
    return digest.hexdigest()
