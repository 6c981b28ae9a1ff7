"""Runs independent jobs: in this process, in processes of this machine, or on the workers of a cluster.

A job writes its own result file and returns at once when that file exists, so that a job may be begun again anywhere.
The last two ways send it as bytes made by cloudpickle, which takes lambdas and functions of a script.

A cluster is one of dask.distributed. It is pure Python, it has launchers for batch systems and for Kubernetes, and its
client is an executor of `concurrent.futures`, so that the loop below is the same for processes and clusters.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import platform
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

import cloudpickle
import jax

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.keys import versions

Job = TypeVar("Job")
Result = TypeVar("Result")
RunJobs = Callable[[Sequence[Job]], Iterable[tuple[Job, Result]]]

_LOGGER = logging.getLogger(__name__)
_SECONDS_TO_CONNECT = 10
_SECONDS_BETWEEN_LOOKS = 1.0
_KEPT = "Finished runs are kept: the same command goes on from there."


def run_all(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    executor: str | None = None,
    num_processes: int | None = None,
    deadline: float | None = None,
) -> Generator[tuple[Job, Result], None, None]:
    """Runs a function for every job, and yields each job with its result as it completes, in any order.

    Workers keep their process between jobs, and with it what the function caches: data sets, compiled programs.
    Closing the generator, or an interrupt, ends the processes of this machine at once. On a cluster it begins no more
    jobs, and leaves the workers to finish the job they are in.

    Args:
      function: what a job is run with. It has to be such that running a job twice does no harm.
      jobs: its arguments.
      executor: `None` or `"processes"` for processes of this machine; the address of a cluster's scheduler, as in
        `tcp://HOST:PORT`, or the path of its scheduler file, which ends in `.json`. A job whose worker dies is run
        again on another one, as often as the setting `distributed.scheduler.allowed-failures` of the scheduler says.
      num_processes: processes of this machine, each of them on one core. With 1, jobs are run in this process. By
        default one for each core if JAX computes on CPU, and 1 on an accelerator.
      deadline: value of `time.monotonic()` after which no further job is begun. Jobs that run are finished.

    Returns:
      A generator of pairs of a job, as it was given, and its result.

    Raises:
      UsageError: if an argument cannot be used, a worker was killed, or a cluster cannot be reached or has workers of
        other versions.
      Exception: whatever the function raises first. What runs then is finished, and no further job is begun.
    """
    jobs = list(jobs)
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"num_processes {num_processes} must be positive.")
    if executor is None or executor == "processes":
        num_processes = num_processes or _default_num_processes()
        if num_processes == 1:
            return _run_here(function, jobs, deadline)
        return _run_on(_processes(min(num_processes, max(len(jobs), 1))), function, jobs, deadline)
    if "://" not in executor and not executor.endswith(".json"):
        raise UsageError(
            f"--executor {executor!r} is not known. Give processes, the address of a scheduler as in tcp://HOST:8786, "
            "or the path of its scheduler file, which ends in .json."
        )
    if num_processes is not None:
        raise UsageError(
            f"--num-processes {num_processes} counts processes of this machine, and --executor {executor} is a "
            "cluster, which has as many as it has workers. Give only one of the two."
        )
    return _run_on(_cluster(executor), function, jobs, deadline)


@contextlib.contextmanager
def kept_processes(
    function: Callable[[Job], Result], num_processes: int | None = None
) -> Generator[RunJobs[Job, Result]]:
    """Processes of this machine that run jobs again and again, and keep what they have compiled.

    Args:
      function: what a job is run with.
      num_processes: see `run_all`.

    Yields:
      A function that runs some jobs, and yields each with its result as it completes.
    """
    num_processes = num_processes or _default_num_processes()
    if num_processes == 1:
        yield lambda jobs: _run_here(function, jobs, None)
        return
    with _processes(num_processes) as workers:
        yield lambda jobs: _run_on(contextlib.nullcontext(workers), function, jobs, None)


@dataclasses.dataclass(frozen=True)
class _Workers:
    """Where jobs are run."""

    submit: Callable[[bytes, bytes, dict[str, str]], concurrent.futures.Future[bytes]]
    """Begins `_run_job`."""
    count: Callable[[], int]
    """How many workers there are now."""
    explain: Callable[[Exception], Exception]
    """Says what an error means that is not of a job, but of the workers."""


def _run_here(
    function: Callable[[Job], Result], jobs: Sequence[Job], deadline: float | None
) -> Generator[tuple[Job, Result], None, None]:
    for job in jobs:
        if _is_past(deadline):
            return
        yield job, function(job)


def _run_on(
    connection: contextlib.AbstractContextManager[_Workers],
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    deadline: float | None,
) -> Generator[tuple[Job, Result], None, None]:
    if not jobs or _is_past(deadline):
        return
    function_bytes, expected = cloudpickle.dumps(function), _versions()
    waiting = collections.deque(jobs)
    running: dict[concurrent.futures.Future[bytes], Job] = {}
    failure: Exception | None = None
    with connection as workers:
        while waiting or running:
            count = _explained(workers, workers.count)
            is_closing = failure is not None or _is_past(deadline)
            if is_closing:
                waiting.clear()
                if count == 0:
                    break  # What was sent to a worker that is gone would have to be begun again.
            # Never more jobs than workers, so that each one that was sent has begun.
            while waiting and len(running) < count:
                job_bytes = cloudpickle.dumps(waiting[0])
                submit = functools.partial(workers.submit, function_bytes, job_bytes, expected)
                running[_explained(workers, submit)] = waiting.popleft()
            if not running:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            done, _ = concurrent.futures.wait(running, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    result = _result_of(_explained(workers, future.result))
                except Exception as error:
                    failure = failure or error
                else:
                    yield job, result
    if failure is not None:
        raise failure


def _explained(workers: _Workers, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except UsageError:
        raise
    except Exception as error:
        raise workers.explain(error) from error


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


# On a worker.


def _run_job(function: bytes, job: bytes, expected: dict[str, str]) -> bytes:
    """Runs one job.

    It raises nothing and returns what was raised, so that an error of the executor is never one of the job.

    Args:
      function: what to call, as bytes.
      job: its argument, as bytes.
      expected: the versions of whoever sends the job.

    Returns:
      Whether it failed, and the result or the error, as bytes.
    """
    _keep_to_one_thread()
    try:
        _check_versions(expected)
        return cloudpickle.dumps((False, _load_function(function)(_load(job))))
    except UsageError as error:
        return cloudpickle.dumps((True, error))
    except Exception as error:
        text = f"In the worker {_this_process()}:\n{traceback.format_exc()}"
        error.add_note(text)
        try:
            error_bytes = cloudpickle.dumps((True, error))
            cloudpickle.loads(error_bytes)
        except Exception:  # There are errors that cannot be made again from what they were made of.
            return cloudpickle.dumps((True, RuntimeError(text)))
        return error_bytes


def _result_of(outcome: bytes) -> Any:
    is_error, value = cloudpickle.loads(outcome)
    if is_error:
        raise value
    return value


@functools.lru_cache(maxsize=8)
def _load_function(function: bytes) -> Callable[[Any], Any]:
    """The function, the same one for every job, so that what it keeps between jobs is kept."""
    return _load(function)


def _load(value: bytes) -> Any:
    try:
        return cloudpickle.loads(value)
    except ImportError as error:
        raise UsageError(
            f"The worker {_this_process()} cannot import what a job is made of: {error}. Start the workers in an "
            "environment that has it, or with its folder in PYTHONPATH."
        ) from error


def _versions() -> dict[str, str]:
    return {**versions(), "python": ".".join(platform.python_version_tuple()[:2])}


def _check_versions(expected: dict[str, str]) -> None:
    actual = _versions()
    differences = [
        f"{name} {actual[name]} instead of {version}" for name, version in expected.items() if actual[name] != version
    ]
    if differences:
        raise UsageError(
            f"The worker {_this_process()} has {', '.join(differences)}. Start the workers in the environment of this "
            "command, or in one with the same versions."
        )


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


@functools.cache
def _keep_to_one_thread() -> None:
    """Has no effect on a process that has used JAX before."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


# Processes of this machine.


@contextlib.contextmanager
def _processes(count: int) -> Generator[_Workers]:
    # Not forked: a forked process inherits the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        count, context, _initialize_process, (context.Value("i", 0), _cores(), watched)
    )
    try:
        yield _Workers(functools.partial(pool.submit, _run_job), lambda: count, _explain_process)
        pool.shutdown()
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _initialize_process(counter: Any, cores: Sequence[int], watched: Connection) -> None:
    """Pins a new worker process to a core of its own, and ends it when the parent process does.

    Args:
      counter: how many processes have begun, shared by all.
      cores: the cores there are.
      watched: a pipe of which the parent process holds the other end, and nobody else does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent process ends this one.
    threading.Thread(target=_exit_with_parent, args=(watched,), daemon=True).start()
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def _exit_with_parent(watched: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv_bytes()
    os._exit(1)


def _explain_process(error: Exception) -> Exception:
    if isinstance(error, BrokenProcessPool):
        return UsageError(
            f"A worker process ended abruptly; perhaps it was killed because memory ran out. {_KEPT} With a smaller "
            "num_processes each process has more memory."
        )
    return error


def _default_num_processes() -> int:
    return len(_cores()) if jax.default_backend() == "cpu" else 1


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# A cluster.


@contextlib.contextmanager
def _cluster(address: str) -> Generator[_Workers]:
    try:
        import distributed
    except ImportError as error:
        raise UsageError(
            f"executor {address} is a cluster of dask.distributed, which cannot be imported ({error}). Install the "
            "extra: pip install 'wnn-jax[cluster]'."
        ) from error

    if "://" not in address and not Path(address).is_file():
        raise UsageError(f"executor {address} does not exist. Start the scheduler with --scheduler-file {address}.")
    where: dict[str, Any] = {"address": address} if "://" in address else {"scheduler_file": address}
    try:
        client = distributed.Client(**where, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"executor {address} cannot be reached: {error}. Check that the scheduler runs, and that this machine can "
            "connect to its address."
        ) from error

    was_waiting = False

    def count() -> int:
        nonlocal was_waiting
        threads = cast(dict[str, int], client.nthreads())
        for worker, num_threads in threads.items():
            if num_threads != 1:
                raise UsageError(
                    f"The worker {worker} of executor {address} has {num_threads} threads, and a run needs a process "
                    "of its own. Start the workers with --nthreads 1, and more of them with --nworkers."
                )
        if not threads and not was_waiting:
            _LOGGER.warning("Waiting for workers of %s.", address)
        was_waiting = not threads
        return len(threads)

    def explain(error: Exception) -> Exception:
        if isinstance(error, distributed.KilledWorker):
            return UsageError(
                f"A job was tried on {error.allowed_failures + 1} workers of executor {address}, and every one of them "
                f"died in it; the last was {error.last_worker.address}. Perhaps memory or the time limit of the "
                f"workers is too small for it: their logs tell. {_KEPT}"
            )
        if isinstance(error, ImportError | AttributeError):
            return UsageError(
                f"A worker of executor {address} could not load wnn_jax.lab: {error}. Install the same version of "
                "wnn_jax there, with the extras lab and cluster."
            )
        return UsageError(f"The connection to executor {address} was lost ({error!r}). {_KEPT}")

    # A function inside of another one is sent as its code, not as its name: the scheduler and a worker that lack this
    # module cannot read the name, and then the job would neither run nor fail.
    def run_job(function: bytes, job: bytes, expected: dict[str, str]) -> bytes:
        from wnn_jax.lab import jobs

        return jobs._run_job(function, job, expected)

    submit = functools.partial(client.get_executor(pure=False).submit, run_job)
    try:
        yield _Workers(submit, count, explain)
    finally:
        # A client that has lost its scheduler tells in the log that closing it ends its attempts to connect.
        logger = logging.getLogger("distributed.client")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        client.close()
        logger.setLevel(level)
