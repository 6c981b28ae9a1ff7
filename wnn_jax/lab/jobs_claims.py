"""Claims, by which several processes share the runs of one folder instead of making them twice.

A claim is a lock of the operating system on a file beside the one that is to be made. It ends with its process, however
that ends, and on a network folder with the connection of its machine.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock

from wnn_jax.lab.jobs import run_all

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 1.0
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class SharedJob(Protocol):
    """A job that other processes may have too."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that it makes."""
        ...


Job = TypeVar("Job", bound=SharedJob)


@contextlib.contextmanager
def claim(file: Path) -> Generator[bool]:
    """Claims a file that is to be made, for as long as the context lasts.

    Where the file system has no locks, every claim is granted: then a run may be made twice, which does no harm.

    Args:
      file: what is to be made. Its folder has to be there.

    Yields:
      Whether the claim is granted, because no other process or thread holds it.

    Raises:
      OSError: if nothing can be written in the folder.
    """
    if not file.parent.is_dir():  # The lock would make it anew.
        raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(file.parent))
    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"), blocking=False, fallback_to_soft=False)
    is_granted = True
    try:
        lock.acquire()
    except filelock.Timeout:
        is_granted = False
    except OSError as error:
        # On a network folder, the lock that another machine has just removed.
        is_granted = error.errno != errno.ESTALE
        if is_granted and error.errno not in _NO_LOCKS:
            raise
    try:
        yield is_granted
    finally:
        if lock.is_locked:
            # Whoever has opened it in the meantime notices that it is gone, and is not granted the claim.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def run_shared(
    function: Callable[[Job], Any], jobs: Sequence[Job], *, deadline: float | None = None, **options: Any
) -> Generator[Job, None, None]:
    """Runs jobs of which other processes may run some, too: here as many as nobody else does.

    What others have claimed is left to them, until they have made it or have ended.

    Args:
      function: what a job is run with. It makes each file of the job that is missing, while it holds the claim on it,
        and leaves out those that it is not granted.
      jobs: its arguments.
      deadline: value of `time.monotonic()` after which no further job is begun, nor waited for.
      **options: further ones of `run_all`.

    Yields:
      Each job when all its files are there, whoever made them.

    Raises:
      UsageError: see `run_all`.
    """
    waiting = list(jobs)
    is_told = False
    while waiting and (deadline is None or time.monotonic() < deadline):
        free = [job for job in waiting if any(map(_is_free, job.files))]
        for job, _ in run_all(function, free, deadline=deadline, **options):
            if _is_done(job):
                waiting.remove(job)
                yield job
        for job in [job for job in waiting if _is_done(job)]:
            waiting.remove(job)
            yield job
        if waiting and not free:
            if not is_told:
                _LOGGER.warning("Waiting for another process, which makes %s.", waiting[0].files[0])
                is_told = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_done(job: SharedJob) -> bool:
    return all(file.exists() for file in job.files)


def _is_free(file: Path) -> bool:
    """Whether a file is missing, and nobody makes it."""
    if file.exists():
        return False
    with claim(file) as is_granted:
        return is_granted
