"""Jobs in this process, in processes of this machine, and on a cluster of a scheduler and two workers."""

import collections
import contextlib
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
import jax
import pytest
from rich.console import Console

from wnn_jax.lab import jobs as jobs_module
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.jobs import run_all
from wnn_jax.lab.progress import Progress

ROOT = Path(__file__).parents[3]
DASK = (sys.executable, "-P", "-m")
SECONDS = 60.0


def wait_until(is_so: Callable[[], object]) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "It did not happen in time."
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ignores_interrupts(pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) >> (signal.SIGINT - 1) & 1)


# The workers cannot import this file: its functions are sent as their code, as those of a script are.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def keyed(folder: Path, prepare: Callable[[int], None] = lambda index: None) -> Callable[[int], tuple[int, int]]:
    """A job as those of training are: its result is a file, which is complete or is not there.

    A second result for the same job is an error, and `begun.txt` has a line for each time that a job had to be done.
    """

    def run(index: int) -> tuple[int, int]:
        path = folder / f"{index}.result"
        if not path.exists():
            with (folder / "begun.txt").open("a") as file:
                file.write(f"{index}\n")
            prepare(index)
            temporary = folder / f"{index}.{os.getpid()}.temporary"
            temporary.write_text(str(index * index))
            os.link(temporary, path)
        return int(path.read_text()), os.getpid()

    return run


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)


def begun(folder: Path) -> collections.Counter[int]:
    return collections.Counter(map(int, (folder / "begun.txt").read_text().split()))


def fatal_once(folder: Path) -> Callable[[int], None]:
    """Lets job 0, the first time, tell its process and wait to be killed."""

    def prepare(index: int) -> None:
        path = folder / "victim.txt"
        if index == 0 and not path.exists():
            path.with_suffix(".temporary").write_text(str(os.getpid()))
            path.with_suffix(".temporary").rename(path)
            time.sleep(600)

    return prepare


def kill_victim(folder: Path) -> int:
    path = folder / "victim.txt"
    wait_until(path.exists)
    pid = int(path.read_text())
    os.kill(pid, signal.SIGKILL)
    return pid


# The cluster.


@contextlib.contextmanager
def process(*command: str, folder: Path, **environment: str) -> Generator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    with (folder / "log.txt").open("ab") as log:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def scheduler(folder: Path) -> Generator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler, and the path of its file."""
    path = folder / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--no-dashboard")
    command = (*DASK, "distributed.cli.dask_scheduler", *options, "--scheduler-file", str(path))
    with process(*command, folder=folder, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1") as child:
        wait_until(lambda: path.exists() and path.read_text().endswith("}"))
        yield child, str(path)


def workers(
    path: str, *options: str, folder: Path, **environment: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    options = (*options, "--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0")
    return process(
        *DASK, "distributed.cli.dask_worker", "--scheduler-file", path, *options, folder=folder, **environment
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of the scheduler file of a cluster of two workers, which begin again when they are killed."""
    folder = tmp_path_factory.mktemp("cluster")
    with scheduler(folder) as (_, path), workers(path, "--nthreads", "1", "--nworkers", "2", folder=folder):
        with distributed.Client(scheduler_file=path, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=SECONDS)
        yield path


@pytest.fixture(params=["processes", "cluster"])
def place(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Where to run jobs, two at a time."""
    return {"executor": request.getfixturevalue("cluster")} if request.param == "cluster" else {"num_processes": 2}


def test_every_job_comes_with_its_result(place: Mapping[str, Any], tmp_path: Path) -> None:
    def together(index: int) -> None:
        """The first two wait for each other, which they can only do on two workers."""
        if index < 2:
            (tmp_path / f"{index}.there").touch()
            wait_for(tmp_path / f"{1 - index}.there")

    results = list(run_all(keyed(tmp_path, together), range(5), **place))
    assert sorted((job, result) for job, (result, _) in results) == [(job, job * job) for job in range(5)]
    processes = {pid for _, (_, pid) in results}
    assert len(processes) == 2
    assert os.getpid() not in processes
    # Nothing is done again.
    again = list(run_all(keyed(tmp_path), range(5), num_processes=1))
    assert sorted((job, result) for job, (result, _) in again) == [(job, job * job) for job in range(5)]
    assert begun(tmp_path) == dict.fromkeys(range(5), 1)


def test_a_worker_keeps_what_a_function_caches(place: Mapping[str, Any]) -> None:
    calls: list[int] = []

    def count(job: int) -> tuple[int, int]:
        calls.append(job)
        return os.getpid(), len(calls)

    counts = [result for _, result in run_all(count, range(6), **place)]
    most = collections.Counter(pid for pid, _ in counts)
    assert sorted(counts) == [(pid, index + 1) for pid in sorted(most) for index in range(most[pid])]
    assert not calls


def test_jobs_may_be_functions(cluster: str) -> None:
    jobs = [lambda: 1, lambda: 2]
    results = dict(run_all(lambda job: (job(), lambda: job() * 10), jobs, executor=cluster))
    assert [results[job][0] for job in jobs] == [1, 2]
    assert [results[job][1]() for job in jobs] == [10, 20]


def test_an_error_lets_others_finish_and_begins_no_more(place: Mapping[str, Any], tmp_path: Path) -> None:
    def fail(index: int) -> None:
        if index == 1:
            (tmp_path / "failed").touch()
            raise ZeroDivisionError("one over zero")
        wait_for(tmp_path / "failed")
        time.sleep(0.5)

    done: list[int] = []

    def consume() -> None:
        done.extend(job for job, _ in run_all(keyed(tmp_path, fail), range(6), **place))

    with pytest.raises(ZeroDivisionError, match="one over zero") as error:
        consume()
    assert "in fail" in "".join(error.value.__notes__)  # The traceback of the worker.
    assert done == [0]
    assert begun(tmp_path) == {0: 1, 1: 1}


def test_a_usage_error_stays_one(cluster: str) -> None:
    def fail(job: int) -> None:
        raise UsageError("--size 0 must be positive.")

    with pytest.raises(UsageError, match=r"^--size 0 must be positive\.$") as error:
        list(run_all(fail, [0], executor=cluster))
    assert not hasattr(error.value, "__notes__")


def test_an_error_that_cannot_be_sent_is_told(cluster: str) -> None:
    class TwoPartsError(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def fail(job: int) -> None:
        raise TwoPartsError(1, 2)

    with pytest.raises(RuntimeError, match="1 and 2"):
        list(run_all(fail, [0], executor=cluster))


def test_a_deadline_lets_others_finish_and_begins_no_more(
    place: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines: list[float | None] = []
    monkeypatch.setattr(jobs_module, "_is_past", lambda deadline: deadline in deadlines)  # pyright: ignore[reportUnknownLambdaType]
    done: list[int] = []
    for job, _ in run_all(keyed(tmp_path), range(6), deadline=5.0, **place):
        done.append(job)
        deadlines.append(5.0)
    assert sorted(done) == [0, 1]
    assert begun(tmp_path) == {0: 1, 1: 1}


def test_nothing_is_begun_after_the_deadline(tmp_path: Path) -> None:
    run, now = keyed(tmp_path), time.monotonic()
    assert not list(run_all(run, range(3), num_processes=1, deadline=now))
    assert not list(run_all(run, range(3), num_processes=2, deadline=now))
    assert not (tmp_path / "begun.txt").exists()
    assert len(list(run_all(run, range(3), num_processes=1, deadline=now + 3600))) == 3


def test_closing_begins_no_more(place: Mapping[str, Any], tmp_path: Path) -> None:
    def second_waits(index: int) -> None:
        (tmp_path / f"{index}.there").touch()
        if index == 1:
            wait_for(tmp_path / "end")
        wait_for(tmp_path / "1.there")

    results = run_all(keyed(tmp_path, second_waits), range(6), **place)
    job, _ = next(results)
    results.close()
    (tmp_path / "end").touch()
    assert job == 0
    if "executor" in place:
        # The workers are there still. What they began by mistake would have begun before these jobs are done.
        assert len(list(run_all(lambda job: job, range(6), **place))) == 6
    assert begun(tmp_path) == {0: 1, 1: 1}


def test_other_versions(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**jobs_module._versions(), "jax": "0.0.1"}
    monkeypatch.setattr(jobs_module, "_versions", lambda: other)
    with pytest.raises(UsageError, match=f"has jax {jax.__version__} instead of 0.0.1"):
        list(run_all(lambda job: job, [0], executor=cluster))


# In this process.


def test_one_process_is_this_one() -> None:
    job = object()
    ((same, result),) = run_all(lambda job: (job, os.getpid()), [job], num_processes=1)
    assert same is job
    assert result == (job, os.getpid())


@pytest.mark.parametrize(("backend", "num_cores"), [("cpu", 1), ("gpu", 2)])
def test_default_of_one_process(backend: str, num_cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_cores", lambda: list(range(num_cores)))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert [result for _, result in run_all(lambda job: os.getpid(), [0, 1])] == [os.getpid()] * 2


def test_an_error_in_this_process() -> None:
    results = run_all(lambda job: 1 // job, [1, 0, 1], num_processes=1)
    assert next(results) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


# In processes of this machine.


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="This system does not pin processes.")
def test_processes_are_pinned_before_jax_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")

    def threads() -> set[int]:
        return {int(path.name) for path in Path("/proc/self/task").iterdir()}

    def run(job: int) -> tuple[set[int], set[frozenset[int]], str]:
        (tmp_path / f"{job}.there").touch()
        wait_for(tmp_path / f"{1 - job}.there")
        before = threads()
        jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64))).block_until_ready()
        started = {frozenset(os.sched_getaffinity(thread)) for thread in threads() - before}
        return os.sched_getaffinity(0), started, os.environ["XLA_FLAGS"]

    available = os.sched_getaffinity(0)
    results = [result for _, result in run_all(run, range(2), num_processes=2)]
    cores = [core for core, _, _ in results]
    assert [len(core) for core in cores] == [1, 1]
    assert len(set.union(*cores)) == min(2, len(available))
    assert os.sched_getaffinity(0) == available
    for core, started, flags in results:
        assert started == {frozenset(core)}
        assert flags == "--xla_cpu_enable_fast_math=false --xla_cpu_multi_thread_eigen=false"


def test_a_killed_process(tmp_path: Path) -> None:
    run = keyed(tmp_path, fatal_once(tmp_path))
    done: list[int] = []

    def consume() -> None:
        for job, _ in run_all(run, range(5), num_processes=2):
            if not done:
                kill_victim(tmp_path)
            done.append(job)

    with pytest.raises(UsageError, match=r"ended abruptly.*Finished runs are kept: the same command goes on"):
        consume()
    assert done
    results = [job for job, _ in run_all(run, range(5), num_processes=2)]
    assert sorted(results) == list(range(5))
    times = begun(tmp_path)
    assert times[0] == 2
    assert all(times[job] == 1 for job in done)


SCRIPT = """
import dataclasses, os, signal, sys, time
from pathlib import Path
from wnn_jax.lab.jobs import run_all

@dataclasses.dataclass
class Answer:
    folder: Path
    index: int

def run(job):
    (job.folder / f"{job.index}.{os.getpid()}.begun").touch()
    while job.index == 1 or not list(job.folder.glob("1.*.begun")):
        time.sleep(0.01)
    return Answer(job.folder, -job.index)

if __name__ == "__main__":
    # A shell starts what runs in the background with interrupts ignored, such as these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for job, answer in run_all(run, [Answer(Path.cwd(), index) for index in range(2)], num_processes=2):
        assert isinstance(answer, Answer)
        Path("answered").touch()
"""


@dataclasses.dataclass(frozen=True)
class _End:
    send: Callable[[int], None]
    code: int


@pytest.mark.slow_but(1)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Processes are looked up as Linux does.")
@pytest.mark.parametrize(
    "end",
    [
        # A terminal interrupts the whole group.
        pytest.param(_End(lambda pid: os.killpg(pid, signal.SIGINT), -signal.SIGINT), id="interrupted"),
        pytest.param(_End(lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL), id="killed"),
    ],
)
def test_a_script_that_ends_leaves_no_process(end: _End, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    script = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2 and (tmp_path / "answered").exists())
        processes = {int(path.name.split(".")[1]) for path in tmp_path.glob("*.begun")}
        assert len(processes) == 2
        assert all(map(is_alive, processes))
        assert all(map(ignores_interrupts, processes))  # They would fill the terminal with tracebacks.
        end.send(script.pid)
        _, errors = script.communicate(timeout=SECONDS)
        assert script.returncode == end.code
        assert b"Process" not in errors  # Neither a broken pool, nor what multiprocessing says of its processes.
        wait_until(lambda: not any(map(is_alive, processes)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


# On a cluster.


def test_a_killed_worker_loses_no_run(cluster: str, tmp_path: Path) -> None:
    done: list[int] = []
    victims: list[int] = []
    processes: set[int] = set()
    log = io.StringIO()
    with Progress("runs", total=8, console=Console(file=log)) as progress:
        for job, (result, pid) in run_all(keyed(tmp_path, fatal_once(tmp_path)), range(8), executor=cluster):
            assert result == job * job
            done.append(job)
            processes.add(pid)
            if not victims:
                victims.append(kill_victim(tmp_path))
            progress.advance()
    assert log.getvalue().splitlines()[-1].startswith("runs: 8 of 8, ")
    assert sorted(done) == list(range(8))
    assert begun(tmp_path) == {**dict.fromkeys(range(8), 1), 0: 2}
    assert not processes & set(victims)


@pytest.mark.slow
def test_a_job_that_kills_every_worker(cluster: str, tmp_path: Path) -> None:
    def die(index: int) -> None:
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UsageError, match=r"tried on 2 workers of executor .*scheduler.json.*Finished runs are kept"):
        list(run_all(keyed(tmp_path, die), range(2), executor=cluster))
    assert begun(tmp_path)[0] == 2


@pytest.mark.slow
def test_a_worker_that_dies_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late"
    monkeypatch.setattr(jobs_module, "_is_past", lambda deadline: late.exists())  # pyright: ignore[reportUnknownLambdaType]

    def die(index: int) -> None:
        late.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with scheduler(tmp_path) as (_, path), workers(path, "--nthreads", "1", "--no-nanny", folder=tmp_path):
        assert not list(run_all(keyed(tmp_path, die), range(3), executor=path, deadline=5.0))
    assert begun(tmp_path) == {0: 1}


def test_workers_with_other_software(tmp_path: Path) -> None:
    (tmp_path / "wnn_jax").mkdir()
    (tmp_path / "wnn_jax" / "__init__.py").write_text("__version__ = '0.0.1'")
    one = ("--nthreads", "1", "--no-nanny")
    with (
        scheduler(tmp_path) as (_, path),
        workers(path, *one, folder=tmp_path, PYTHONPATH=str(tmp_path)),
        pytest.raises(UsageError, match=r"could not load wnn_jax.lab: No module named 'wnn_jax.lab'"),
    ):
        list(run_all(lambda job: job, range(2), executor=path))


def test_workers_of_several_threads(tmp_path: Path) -> None:
    with (
        scheduler(tmp_path) as (_, path),
        workers(path, "--nthreads", "2", "--no-nanny", folder=tmp_path),
        pytest.raises(UsageError, match=r"has 2 threads.*--nthreads 1"),
    ):
        list(run_all(lambda job: job, range(2), executor=path))


def test_a_module_that_workers_lack(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def run(job):\n    return job\n")
    monkeypatch.syspath_prepend(tmp_path)
    from only_here import run  # pyright: ignore[reportMissingImports]

    with pytest.raises(
        UsageError, match=r"cannot import what a job is made of: No module named 'only_here'.*PYTHONPATH"
    ):
        list(run_all(run, [0], executor=cluster))


def test_a_scheduler_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs_module, "_SECONDS_TO_CONNECT", 1)
    with scheduler(tmp_path) as (child, path):
        # There are no workers, for which it waits.
        monkeypatch.setattr(jobs_module.time, "sleep", lambda seconds: child.kill() or child.wait())  # pyright: ignore[reportUnknownLambdaType]
        with pytest.raises(
            UsageError, match=r"connection to executor .*scheduler.json was lost.*Finished runs are kept"
        ):
            list(run_all(lambda job: job, range(2), executor=path))
    assert [record.message for record in caplog.records] == [f"Waiting for workers of {path}."]


def test_a_scheduler_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_SECONDS_TO_CONNECT", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # Nobody listens.
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"executor {address} cannot be reached"):
            list(run_all(lambda job: job, [0], executor=address))


def test_a_cluster_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"cannot be imported.*pip install 'wnn-jax\[cluster\]'"):
        list(run_all(lambda job: job, [0], executor="tcp://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "threads"}, "--executor 'threads' is not known. Give processes,"),
        ({"executor": "missing/scheduler.json"}, "executor missing/scheduler.json does not exist. Start"),
        ({"executor": "other://host:1"}, "executor other://host:1 cannot be reached"),
        ({"executor": "tcp://host:1", "num_processes": 2}, "--num-processes 2 counts processes of this machine"),
        ({"num_processes": 0}, "num_processes 0 must be positive"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(run_all(lambda job: job, [0], **options))
