"""Independent jobs on an executor of `concurrent.futures`: in this process, in others, or on a Dask cluster."""

import collections
import concurrent.futures
import contextlib
import errno
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cloudpickle
import filelock
import jax

from wnn_jax.lab.errors import UsageError

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_CONNECT = 10
# The answers of a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class JobLike(Protocol):
    """A job that makes one result, and that another process may make too."""

    @property
    def file(self) -> Path:
        """A path in a folder that exists. The lock file is next to it."""
        ...

    def is_done(self) -> bool:
        """Return whether the result exists."""
        ...


Job = TypeVar("Job", bound=JobLike)


@contextlib.contextmanager
def lock(file: Path) -> Generator[bool]:
    """Try to lock a file that is to be made, and yield whether no other process or thread holds the lock.

    The operating system ends the lock with its process. Where the file system has no locks, every lock is granted: then
    a result may be made twice, which does no harm. An `OSError` says that the folder cannot be written.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(file.parent))
    held = filelock.FileLock(file.with_name(f".{file.name}.lock"), blocking=False, fallback_to_soft=False)
    is_granted = True
    try:
        held.acquire()
    except filelock.Timeout:
        is_granted = False
    except OSError as error:
        # On a network folder: a lock that another machine has just removed.
        is_granted = error.errno != errno.ESTALE
        if is_granted and error.errno not in _NO_LOCKS:
            raise
    try:
        yield is_granted
    finally:
        if held.is_locked:
            # A process that opened the file in the meantime notices that it is gone, and is not granted the lock.
            with contextlib.suppress(OSError):
                Path(held.lock_file).unlink()
            held.release()


def run_jobs(
    function: Callable[[Job], Any],
    jobs: Iterable[Job],
    *,
    executor: str | None = None,
    num_processes: int | None = None,
    deadline: float | None = None,
) -> Generator[Job, None, None]:
    """Run a function for every job that is not done, and yield each job when its result exists.

    A job whose lock another process holds waits until that process has made it or has ended. Workers keep their process
    between jobs, and with it their caches: data sets and compiled programs.

    Args:
      function: makes the result of a job. Running it twice must do no harm.
      jobs: its arguments.
      executor: `None` for processes of this machine, or a Dask scheduler: an address `tcp://HOST:PORT` or the path of a
        scheduler file, which ends in `.json`.
      num_processes: processes of this machine. With 1 the jobs run in this process. Default: one per core on CPU, one
        on an accelerator.
      deadline: value of `time.monotonic()` after which no further job begins. Running jobs are finished.

    Raises:
      UsageError: if an argument cannot be used, a worker was killed, or a cluster cannot be reached.
      Exception: the first error of the function. Running jobs are finished, and no further job begins.
    """
    waiting = collections.deque(jobs)
    end = math.inf if deadline is None else deadline
    with _open_executor(executor, num_processes, len(waiting)) as (pool, count_workers):
        running: dict[concurrent.futures.Future[Any], Job] = {}
        while (waiting and time.monotonic() < end) or running:
            # Never more jobs than workers, so that every job that was submitted has begun.
            while waiting and len(running) < count_workers() and time.monotonic() < end:
                job = waiting.popleft()
                running[pool.submit(_call, cloudpickle.dumps((function, job)))] = job
            done, _ = concurrent.futures.wait(running, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                was_granted = future.result()
                if job.is_done():
                    yield job
                else:
                    waiting.append(job)
                    if not was_granted:
                        time.sleep(_SECONDS_BETWEEN_LOOKS / max(len(waiting), 1))


def _call(payload: bytes) -> bool:
    """Make the result of a job in a worker, and return whether no other process held the job."""
    function, job = cloudpickle.loads(payload)
    with lock(job.file) as is_granted:
        if is_granted and not job.is_done():
            function(job)
    return is_granted


@contextlib.contextmanager
def _open_executor(
    executor: str | None, num_processes: int | None, num_jobs: int
) -> Generator[tuple[concurrent.futures.Executor, Callable[[], int]]]:
    """Yield an executor, and a function that counts its workers."""
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"--num-processes {num_processes} must be positive.")
    if executor is not None:
        if num_processes is not None:
            raise UsageError(
                f"--num-processes {num_processes} counts processes of this machine, and --executor {executor} is a "
                "cluster with workers of its own. Give only one of the two."
            )
        with _connect(executor) as cluster:
            yield cluster
        return
    default = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = num_processes or (default if jax.default_backend() == "cpu" else 1)
    if num_processes == 1 or num_jobs == 0:
        yield _SerialExecutor(), lambda: 1
        return
    num_processes = min(num_processes, num_jobs)
    # Spawned, not forked: a forked process inherits the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(num_processes, context, _initialize_process, (watched,))
    try:
        yield pool, lambda: num_processes
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UsageError(
            "A worker process ended abruptly; perhaps memory ran out. Finished runs are kept: the same command goes on "
            "from there. With a smaller --num-processes each process has more memory."
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


class _SerialExecutor(concurrent.futures.Executor):
    """Runs each function at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _initialize_process(watched: Connection) -> None:
    """Keep a worker process to one thread, and end it when the main process closes its end of a pipe, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()

    def exit_with_pipe() -> None:
        with contextlib.suppress(EOFError, OSError):
            watched.recv_bytes()
        os._exit(1)

    threading.Thread(target=exit_with_pipe, daemon=True).start()


@contextlib.contextmanager
def _connect(address: str) -> Generator[tuple[concurrent.futures.Executor, Callable[[], int]]]:
    """Connect to a Dask cluster, and yield its executor and a function that counts its workers."""
    is_file = "://" not in address
    if is_file and not address.endswith(".json"):
        raise UsageError(
            f"--executor {address!r} is not known. Give the address of a scheduler, as in tcp://HOST:8786, or the path "
            "of its scheduler file, which ends in .json."
        )
    if is_file and not Path(address).is_file():
        raise UsageError(f"--executor {address} does not exist. Start the scheduler with --scheduler-file {address}.")
    try:
        import distributed
    except ImportError as error:
        raise UsageError(f"--executor {address}: install dask.distributed: pip install 'wnn-jax[cluster]'.") from error
    where: dict[str, Any] = {"scheduler_file" if is_file else "address": address}
    try:
        client = distributed.Client(**where, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--executor {address} cannot be reached: {error}. Check that the scheduler runs.") from error

    def count_workers() -> int:
        threads: Any = client.nthreads()
        for worker, num_threads in threads.items():
            if num_threads != 1:
                raise UsageError(
                    f"The worker {worker} of --executor {address} has {num_threads} threads, and a run needs a process "
                    "of its own. Start the workers with --nthreads 1, and more of them with --nworkers."
                )
        return len(threads)

    try:
        client.wait_for_workers(1)
        client.get_versions(check=True, packages=["wnn_jax", "jax", "jaxlib", "flax", "optax", "numpy"])
        yield client.get_executor(pure=False), count_workers
    except distributed.KilledWorker as error:
        raise UsageError(
            f"A job was tried on {error.allowed_failures + 1} workers of --executor {address}, and every one of them "
            "died in it. Perhaps their memory or time limit is too small: their logs tell. Finished runs are kept."
        ) from error
    except concurrent.futures.CancelledError as error:
        raise UsageError(
            f"The connection to --executor {address} was lost. Finished runs are kept: the same command goes on."
        ) from error
    finally:
        client.close()
