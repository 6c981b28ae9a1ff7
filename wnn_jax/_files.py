"""Writing files so that nothing is lost."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Generator
from pathlib import Path

# Nobody writes a file for so long, whatever the clocks of the machines that share a folder say.
_SECONDS_UNTIL_STALE = 2 * 24 * 60 * 60


@contextlib.contextmanager
def replace_on_success(path: Path) -> Generator[Path]:
    """Yields a new, empty file beside `path`, and moves it to `path` when it is written.

    Its name is its own: any number of threads, processes and machines may write to one path at a time, and a reader
    finds the whole of what one of them wrote. An interruption, an error or a full disk leaves the file that was at
    `path` as it was, and so does a crash of the machine. What is left of writers that were killed is removed by the
    first who writes to the same path two days later.

    Args:
      path: where the file is to be.

    Raises:
      OSError: if no file can be made in the folder of `path`, which it names; or what writing raises.
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
