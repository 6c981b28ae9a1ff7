import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wnn_jax import _files
from wnn_jax._files import replace_on_success

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


def test_threads_that_write_one_file(path: Path):
    threads = [threading.Thread(target=write_often, args=(path, content)) for content in CONTENTS]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in CONTENTS
    assert_whole_and_alone(path)


def test_processes_that_write_one_file(path: Path):
    # With the module on its own: nothing of JAX is needed to write a file.
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


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may write to every folder")
def test_a_read_only_folder_is_named(path: Path):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=f"record.json cannot be written: .*: '{path.parent}'"):
            write_often(path, CONTENTS[1])
    finally:
        path.parent.chmod(0o700)
    assert_whole_and_alone(path)


# What writers that were killed left


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
