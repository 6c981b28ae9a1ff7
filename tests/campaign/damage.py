"""What can become of a file: bytes that are damaged, and JSON, arrays and archives that somebody changed.

A rewrite is given a generator that decides all, the file, and another one of the same kind.
"""

import contextlib
import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wnn_jax._files import checksum as _sha256
from wnn_jax.lab.training.keys import run_key

# Bytes that an archive of some kilobytes unpacks to.
_BOMB = 2**25


class Change(NamedTuple):
    """A changed file.

    Attributes:
      content: of the file.
      has_checksum: whether it may have the right checksum of what it holds now.
    """

    content: bytes
    has_checksum: bool = False


Rewrite = Callable[[np.random.Generator, bytes, bytes], Change]


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of some options."""
    return options[int(rng.integers(len(options)))]


# What is done to bytes


def _position(rng: np.random.Generator, whole: bytes) -> int:
    """Anywhere, or behind a place where something begins."""
    places = [match.start() for match in re.finditer(rb"PK|NUMPY|\{", whole)] if rng.random() < 0.5 else []
    return (
        min(choose(rng, places) + int(rng.integers(130)), len(whole) - 1) if places else int(rng.integers(len(whole)))
    )


def _slice(rng: np.random.Generator, whole: bytes) -> slice:
    start = _position(rng, whole)
    return slice(start, start + 1 + int((len(whole) - start) ** rng.random()))


def _set(whole: bytes, position: int, value: int) -> bytes:
    return whole[:position] + bytes([value]) + whole[position + 1 :]


def _flip_bit(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    position = _position(rng, whole)
    return Change(_set(whole, position, whole[position] ^ 1 << int(rng.integers(8))))


def _set_byte(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    return Change(_set(whole, _position(rng, whole), int(rng.integers(256))))


def _truncate(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    return Change(whole[: _position(rng, whole)])


def _extend(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    added = choose(rng, (rng.bytes(int(rng.integers(1, 500))), bytes(100), b" ", other, whole))
    return Change(whole + added if rng.random() < 0.7 else added + whole)


def _delete(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    part = _slice(rng, whole)
    return Change(whole[: part.start] + whole[part.stop :])


def _end_with_part(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    part = _slice(rng, whole)
    return Change(whole[: part.stop] + whole[part])


def _repeat(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    part = _slice(rng, whole)
    return Change(whole[: part.stop] + whole[part] + whole[part.stop :])


def _zero(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    part = _slice(rng, whole)
    return Change(whole[: part.start] + bytes(len(whole[part])) + whole[part.stop :])


def _swap(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    a, b, c, d = sorted(_position(rng, whole) for _ in range(4))
    return Change(whole[:a] + whole[c:d] + whole[b:c] + whole[a:b] + whole[d:])


def _splice(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    part = _slice(rng, other)
    start = part.start if rng.random() < 0.5 else _position(rng, whole)
    return Change(whole[:start] + other[part] + whole[start + len(other[part]) :])


def _replace(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    return Change(other)


# What is done to JSON

_VALUES = (None, True, False, 0, 1, -1, 7, 10**30, 0.5, 1e308, np.nan, -np.inf, "", "norm", "0.5", "test", [], {}, [1])


def _change_json(rng: np.random.Generator, node: Any) -> Any:
    """A copy with a change somewhere in it."""
    if not isinstance(node, (dict, list)) or not node:
        is_number = isinstance(node, (int, float))
        return node + choose(rng, (1, -1, 0.5)) if is_number and rng.random() < 0.5 else choose(rng, _VALUES)
    changed: Any = node.copy()
    key, other = (choose(rng, list(node) if isinstance(node, dict) else range(len(node))) for _ in range(2))
    if rng.random() < 0.7:
        changed[key] = _change_json(rng, node[key])
    elif rng.random() < 0.3:
        changed[key], changed[other] = node[other], node[key]
    elif rng.random() < 0.5:
        del changed[key]
    elif isinstance(node, dict):
        changed[choose(rng, ("params", "other", "", key.upper()))] = node[key]
    else:
        changed.append(node[key])
    return changed


def _rewrite_json(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    content = json.loads(whole)
    if rng.random() < 0.5:
        return Change(json.dumps(_change_json(rng, content)).encode())
    del content["checksum"]
    content = _change_json(rng, content)
    with contextlib.suppress(TypeError, ValueError):  # Not all of this has a checksum.
        content = {**content, "checksum": run_key(content)}
    return Change(json.dumps(content).encode(), has_checksum=True)


def _replace_text(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    texts = (
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 10**4,
        b"\xff{}",
        b"\xef\xbb\xbf" + whole,
    )
    return Change(choose(rng, texts))


# What is done to arrays

_DTYPES = ("f2", "f8", ">f4", "i4", "u1", "?", "c8", "U4", "S4", "M8[s]", "O")
_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (3L,), }",
    "{'descr': '<a4', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<U999999999', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
    "(" * 9000,
)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _change_array(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    if rng.random() < 0.3:
        return array.astype(choose(rng, _DTYPES))
    if rng.random() < 0.3:
        shapes = (array.ravel(), array[None], array.T, array[:0], array[1:], np.stack([array, array]), array.ravel()[0])
        return np.asarray(choose(rng, shapes))
    if rng.random() < 0.1:
        return np.asfortranarray(array)
    changed = array.copy()
    changed.flat[rng.integers(array.size)] = choose(rng, (np.nan, np.inf, -np.inf, -0.0, 0.25, 1e30))
    return changed


def _change_header(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    if rng.random() < 0.5:
        return Change(_set(whole, int(rng.integers(128)), int(rng.integers(32, 128))))
    header = choose(rng, _HEADERS).encode() + b"\n"
    data = whole[128:] if rng.random() < 0.5 else b""
    return Change(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)


def _rewrite_array(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    return Change(_npy(_change_array(rng, np.load(io.BytesIO(whole)))))


# What is done to archives


class Archive(NamedTuple):
    """The members of an archive, under their names."""

    members: dict[str, bytes]

    @classmethod
    def read(cls, content: bytes) -> "Archive":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return cls({name: archive.read(name) for name in archive.namelist()})

    def arrays(self) -> dict[str, np.ndarray]:
        """Without the metadata, by their names without `.npy`."""
        arrays = {name.removesuffix(".npy"): np.load(io.BytesIO(member)) for name, member in self.members.items()}
        return {name: array for name, array in arrays.items() if name != "metadata"}

    def metadata(self) -> dict[str, Any]:
        return json.loads(str(np.load(io.BytesIO(self.members["metadata.npy"]))))


def _zip(members: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # That a name is there twice.
        for name, member in members:
            archive.writestr(name, member)
    return file.getvalue()


def _sealed(metadata: Any, arrays: Mapping[str, np.ndarray], *, has_checksum: bool) -> Change:
    """A file of a nowcaster, with its checksum if it has any."""
    if has_checksum:
        with contextlib.suppress(TypeError, ValueError):
            metadata = {**metadata, "sha256": _sha256(metadata, arrays)}
    members = {"metadata": np.array(json.dumps(metadata)), **arrays}
    return Change(_zip([(f"{name}.npy", _npy(array)) for name, array in members.items()]), has_checksum)


def _rewrite_metadata(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    archive = Archive.read(whole)
    metadata = archive.metadata()
    has_checksum = rng.random() < 0.6
    if has_checksum:
        del metadata["sha256"]
    return _sealed(_change_json(rng, metadata), archive.arrays(), has_checksum=has_checksum)


def _rewrite_version(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    archive = Archive.read(whole)
    metadata = archive.metadata()
    del metadata["sha256"]
    metadata["version"] = choose(rng, (1, 3, 0, -2, 10**30, 10**4000, 2.5, np.nan, np.inf, True, "2", None, [2], {}))
    return _sealed(metadata, archive.arrays(), has_checksum=rng.random() < 0.5)


def _rewrite_weights(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    archive = Archive.read(whole)
    metadata, arrays = archive.metadata(), archive.arrays()
    has_checksum = rng.random() < 0.5
    if has_checksum:
        del metadata["sha256"]
    name = choose(rng, sorted(arrays) or ["params/kernel"])
    arrays[name] = _change_array(rng, arrays.get(name, np.ones(3, np.float32)))
    return _sealed(metadata, arrays, has_checksum=has_checksum)


def _rewrite_header(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    members = Archive.read(whole).members
    name = choose(rng, sorted(members))
    return Change(_zip([*{**members, name: _change_header(rng, members[name], other).content}.items()]))


def _rewrite_members(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    members = [*Archive.read(whole).members.items()]
    others = Archive.read(other).members
    first, second = (int(rng.integers(len(members))) for _ in range(2))
    name, content = members[first]
    match int(rng.integers(6)):
        case 0:
            del members[first]
        case 1:
            members.append((name, choose(rng, [*others.values()])))
        case 2:
            members[first] = (choose(rng, [*others, "metadata", "params/", "../x.npy", "x\x00.npy", "é.npy"]), content)
        case 3:
            members[first], members[second] = (name, members[second][1]), (members[second][0], content)
        case 4:
            members.append((choose(rng, [*others, "other.npy", "chunk_size.npy", "record/x.npy"]), content))
        case _:
            members[first], members[second] = members[second], members[first]
    return Change(_zip(members))


def _compress(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    compression = choose(rng, (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return Change(_zip([*Archive.read(whole).members.items()], compression))


def _blow_up(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    members = Archive.read(whole).members
    name = choose(rng, [*members, "params/bomb.npy"])
    bomb = members.get(name, b"") + bytes(_BOMB)
    return Change(_zip([*{**members, name: bomb}.items()], zipfile.ZIP_DEFLATED))


def _nest(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    """Members each of which holds all that come after it: nothing is compressed, and the file is small."""
    content, headers = whole + bytes(2**15), list[bytes]()
    for number in range(300):
        member = zipfile.ZipInfo(f"{number:03}.npy")
        member.CRC, member.compress_size, member.file_size = zlib.crc32(content), len(content), len(content)
        headers.insert(0, member.FileHeader())
        content = headers[0] + content
    places = [number * len(headers[0]) for number in range(len(headers))]
    entries = [
        b"PK\x01\x02\x14\x00" + header[4:30] + bytes(10) + place.to_bytes(4, "little") + header[30:]
        for header, place in zip(headers, places, strict=True)
    ]
    directory, number = b"".join(entries), len(entries).to_bytes(2, "little")
    sizes = len(directory).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    return Change(content + directory + b"PK\x05\x06" + bytes(4) + number * 2 + sizes + bytes(2))


def _declare_sizes(rng: np.random.Generator, whole: bytes, other: bytes) -> Change:
    """With other sizes of a member in the directory, one of them or both, or with another place."""
    entry = choose(rng, [match.start() for match in re.finditer(rb"PK\x01\x02", whole)])
    size = int(choose(rng, (0, 1, 2**31 - 1, 2**32 - 1, rng.integers(2**32), rng.integers(10**5))))
    start, stop = choose(rng, ((20, 28), (20, 24), (24, 28), (42, 46)))
    fields = size.to_bytes(4, "little") * ((stop - start) // 4)
    return Change(whole[: entry + start] + fields + whole[entry + stop :])


REWRITES_OF_BYTES: Mapping[str, Rewrite] = {
    "a bit": _flip_bit,
    "a byte": _set_byte,
    "truncated": _truncate,
    "extended": _extend,
    "a part deleted": _delete,
    "another end": _end_with_part,
    "a part repeated": _repeat,
    "a part zeroed": _zero,
    "parts swapped": _swap,
    "a part of another file": _splice,
}
REWRITES: Mapping[str, Mapping[str, Rewrite]] = {
    ".json": {"a value": _rewrite_json, "another text": _replace_text, "another file": _replace},
    ".npy": {"an array": _rewrite_array, "a header": _change_header, "another file": _replace},
    ".npz": {
        "metadata": _rewrite_metadata,
        "version": _rewrite_version,
        "weights": _rewrite_weights,
        "a header": _rewrite_header,
        "members": _rewrite_members,
        "compressed": _compress,
        "a bomb": _blow_up,
        "nested": _nest,
        "sizes": _declare_sizes,
    },
}
