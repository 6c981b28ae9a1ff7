"""Files that are written whole or not at all, and arrays with a checksum."""

import errno
import io
import json
import os
import re
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wnn_jax import _files
from wnn_jax._files import read_arrays, replace_on_success, write_arrays

NUM_WRITES = 25
CONTENTS = [letter * 200_000 for letter in (b"a", b"b", b"c")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    path.write_bytes(CONTENTS[0])
    return path


def assert_whole_and_alone(path: Path) -> None:
    assert path.read_bytes() in CONTENTS
    assert list(path.parent.iterdir()) == [path]


# Several writers of one file


def write_often(path: Path, content: bytes) -> None:
    for _ in range(NUM_WRITES):
        with replace_on_success(path) as temporary, temporary.open("wb", buffering=0) as file:
            file.write(content[1:])
            file.write(content[:1])


def test_processes_that_write_one_file(path: Path):
    # The module on its own starts without JAX.
    program = f"""
import runpy, sys
from pathlib import Path
replace_on_success = runpy.run_path({_files.__file__!r})["replace_on_success"]
for _ in range({NUM_WRITES}):
    with replace_on_success(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(sys.argv[2].encode() * {len(CONTENTS[0])})
"""
    processes = [subprocess.Popen([sys.executable, "-I", "-c", program, str(path), letter]) for letter in "bc"]
    while any(process.poll() is None for process in processes):
        assert path.read_bytes() in CONTENTS
    assert [process.returncode for process in processes] == [0, 0]
    assert path.read_bytes() in CONTENTS[1:]
    assert_whole_and_alone(path)


def test_no_two_writers_have_one_temporary_name(path: Path):
    # In one process, as processes of two containers may have one number.
    with replace_on_success(path) as one, replace_on_success(path) as other:
        assert one != other
        assert one.parent == other.parent == path.parent
        one.write_bytes(CONTENTS[1])
        other.write_bytes(CONTENTS[2])
    assert_whole_and_alone(path)


# What goes wrong


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_there_was_and_nothing_else(path: Path, error: type[BaseException]):
    def write_half() -> None:
        with replace_on_success(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == CONTENTS[0]
    assert_whole_and_alone(path)


def test_a_full_disk_leaves_what_there_was_and_nothing_else(path: Path):
    resource = pytest.importorskip("resource")  # Windows has none.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files end at this length, as they do where the disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError) as caught, replace_on_success(path) as temporary:  # noqa: PT011
            temporary.write_bytes(CONTENTS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == CONTENTS[0]
    assert_whole_and_alone(path)


def test_what_was_written_is_on_the_disk_before_it_is_moved(path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[int, bytes]] = []
    fsync = os.fsync

    def noted_fsync(file: int) -> None:
        fsync(file)
        synced.append((os.fstat(file).st_size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    with replace_on_success(path) as temporary:
        temporary.write_bytes(b"new")
    assert synced == [(3, CONTENTS[0])]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("folder", ["missing", "record.json"])
def test_a_folder_in_which_no_file_can_be_made_is_named(path: Path, folder: str):
    error = FileNotFoundError if folder == "missing" else NotADirectoryError
    parent = path.parent / folder
    with (
        pytest.raises(error, match=f"table.csv cannot be written: .*: '{parent}'"),
        replace_on_success(parent / "table.csv"),
    ):
        pytest.fail("there is nothing to write to")
    assert_whole_and_alone(path)


def test_what_is_left_of_killed_writers_is_removed_once_nobody_can_be_writing_it(path: Path):
    def leave(name: str, days: float) -> Path:
        left = path.with_name(name)
        left.write_bytes(b"half")
        written = path.stat().st_mtime - days * 24 * 60 * 60
        os.utime(left, (written, written))
        return left

    stale = [leave(f".record.json.{digit * 16}.tmp", 3) for digit in "0f"]
    kept = {
        leave(".record.json.1111111111111111.tmp", 1),
        leave(".other.json.2222222222222222.tmp", 3),
        leave(".record.json.notes.tmp", 3),
        leave("record.json.3333333333333333.tmp", 3),
    }
    with pytest.raises(ValueError), replace_on_success(path):  # noqa: PT011
        raise ValueError
    assert set(path.parent.iterdir()) == {path, *stale, *kept}
    write_often(path, CONTENTS[1])
    assert set(path.parent.iterdir()) == {path, *kept}


# Arrays

DAMAGED = r"arrays\.npz cannot be read: it is damaged, or this wnn_jax did not write it \(.*\)\. Ask again\."
HEADER = {"format": "wnn_jax.test", "version": 1, "name": "é", "sizes": [1, 2]}
ARRAYS = {"file": np.arange(6.0, dtype=np.float32).reshape(2, 3), "keys/0": np.array([1, 2], np.uint32)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "arrays.npz"
    write_arrays(path, ARRAYS, HEADER)
    return path


def read(path: Path) -> Any:
    return read_arrays(path, format_name="wnn_jax.test", version=1, remedy="Ask again.")


@pytest.mark.parametrize(
    "array",
    [
        *(np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("bool", "i1", "u4", "i8", "f2", "f8", ">f4", ">i2")),
        np.asarray(jnp.arange(6.0, dtype=jnp.bfloat16)).reshape(2, 3),
        np.asarray(jnp.bfloat16(3)),
        np.array(True),
        np.zeros([0, 3]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.asarray(jax.random.key_data(jax.random.key(3))),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back_as_they_were(tmp_path: Path, array: np.ndarray):
    path = tmp_path / "arrays.npz"
    write_arrays(path, {"a/b": array, **ARRAYS}, {**HEADER, "sizes": (1, 2)})
    header, arrays = read(path)
    assert header == HEADER
    assert list(arrays) == ["a/b", *ARRAYS]
    assert (arrays["a/b"].dtype, arrays["a/b"].shape) == (array.dtype.newbyteorder("="), array.shape)
    np.testing.assert_array_equal(arrays["a/b"], array)


@pytest.mark.parametrize("array", [np.array("x"), np.array([1j]), np.array([None]), jax.random.key(0)], ids=repr)
def test_arrays_that_cannot_be_written(saved: Path, array: Any):
    with pytest.raises(ValueError, match=r"arrays\.npz cannot hold the array 'a' of dtype .*jax\.random\.key_data"):
        write_arrays(saved, {"a": array}, HEADER)
    with pytest.raises(ValueError, match=r"cannot hold the array 'metadata' .* no name 'metadata'"):
        write_arrays(saved, {"metadata": np.zeros(3)}, HEADER)
    for number, error in ((float("nan"), ValueError), (np.float32(1), TypeError)):
        with pytest.raises(error):
            write_arrays(saved, {}, {"number": number})
    assert read(saved)[0] == HEADER
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_mode_follows_the_umask(saved: Path, umask: int, mode: int):
    previous = os.umask(umask)
    try:
        write_arrays(saved, {}, HEADER)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(saved.stat().st_mode) == mode


def test_a_file_of_another_format_is_refused_before_its_checksum_is_looked_at(saved: Path):
    for format_name, version in (("wnn_jax.test", 2), ("wnn_jax.test", True), ("other", 1)):
        np.savez(saved, metadata=np.array(json.dumps({"format": format_name, "version": version})))
        with pytest.raises(ValueError, match=rf"has the format '{format_name}', version {version}; this .* version 1,"):
            read(saved)
    with pytest.raises(FileNotFoundError):
        read(saved.with_name("missing.npz"))


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (n,), }"


def with_header(saved: Path, header: str) -> bytes:
    members = {"a": b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n"}
    return zipped({"metadata": npy(json.dumps(HEADER)), **members})


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(array))
    return file.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def resealed(saved: Path, **changes: Any) -> bytes:
    """With another header or other arrays, and the checksum that there was."""
    with np.load(saved) as file:
        arrays: dict[str, Any] = dict(file)
    header = json.loads(str(arrays.pop("metadata"))) | {name: new for name, new in changes.items() if name in HEADER}
    arrays |= {name: new for name, new in changes.items() if name in ARRAYS}
    return zipped({"metadata": npy(json.dumps(header)), **{name: npy(array) for name, array in arrays.items()}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        *((lambda saved, share=share: saved.read_bytes()[: int(share * 1500)], "") for share in (0, 0.1, 0.9)),
        *((lambda _, content=content: content, "") for content in (b"PK\x03\x04", b"\x93NUMPY", b"{}", npy(1.0))),
        *((lambda _, text=text: zipped({"metadata": npy(text)}), "") for text in ("[1]", "1", "{")),
        (lambda _: zipped({"kernel": npy(1.0)}), "KeyError"),
        (lambda saved: saved.read_bytes() * 2, "something else comes before it"),
        (lambda saved: resealed(saved, name="e"), "its content does not match its checksum"),
        (lambda saved: resealed(saved, file=ARRAYS["file"] + 1), "its content does not match its checksum"),
        (lambda saved: resealed(saved, file=ARRAYS["file"].astype(np.float64)), "its checksum"),
        (lambda saved: resealed(saved, sizes=float("nan")), "ValueError"),
        (lambda saved: with_header(saved, "{'descr': '<a4', 'fortran_order': False, 'shape': (1,), }"), "a dtype"),
        (lambda saved: with_header(saved, "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "a dtype"),
        (lambda saved: with_header(saved, "(" * 5000), "a dtype"),
        (lambda saved: with_header(saved, FLOATS.replace("(n", "(" + "9" * 14)), ""),
        (lambda saved: with_header(saved, FLOATS.replace("(n", "(" + "9" * 24)), ""),
    ],
)
def test_a_damaged_file_is_refused_with_one_line(saved: Path, damage: Any, reason: str):
    saved.write_bytes(damage(saved))
    with pytest.raises(ValueError, match=f"^.*{DAMAGED}$") as caught:
        read(saved)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_length_of_an_arrays_header_is_taken_for_another(saved: Path):
    whole = saved.read_bytes()
    for start in [match.end() for match in re.finditer(b"NUMPY\x01\x00", whole)]:
        for bit in range(16):
            position = start + bit // 8
            saved.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit % 8]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=DAMAGED):
                read(saved)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_members_of_one_name(saved: Path):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("file.npy", npy(1.0))
    with pytest.raises(ValueError, match="it holds two arrays of one name"):
        read(saved)


def test_nothing_is_unpacked_that_is_larger_than_the_file(saved: Path):
    compressed = zipped({"metadata": npy("{}"), "file": npy(np.zeros(10**7, np.float32))}, zipfile.ZIP_DEFLATED)
    whole = zipped({"metadata": npy("{}"), "file": npy(np.zeros(1000))})
    # The directory, at the end, says that a member is larger than the file.
    size = len(npy(np.zeros(1000))).to_bytes(4, "little")
    declared = (10**8).to_bytes(4, "little")
    larger = whole[: whole.rindex(b"PK\x01\x02")] + whole[whole.rindex(b"PK\x01\x02") :].replace(size, declared)
    for content, reason in ((compressed, "it is compressed"), (larger, "it is shorter than what it holds")):
        saved.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=reason):
            read(saved)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6
