"""Writing files so that nothing is lost."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def replace_on_success(path: Path) -> Generator[Path]:
    """Yields a temporary path beside `path`, and moves what was written there to `path`.

    An interruption or an error leaves the file that was at `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
