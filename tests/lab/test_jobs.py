"""Jobs in this process, in processes of this machine, and on a cluster of a scheduler and two workers."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
import pytest

from wnn_jax.lab import jobs as jobs_module
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.jobs import lock, run_jobs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
}
SECONDS = 60.0

# The workers cannot import this file: its functions are sent as their code, like the functions of a script.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class WriteFile:
    file: Path

    def is_done(self) -> bool:
        return self.file.exists()


def write(job: WriteFile) -> None:
    with (job.file.parent / "begun.txt").open("a") as file:
        file.write(f"{job.file.name}\n")
    job.file.write_text(str(os.getpid()))


def jobs_in(folder: Path, number: int) -> list[WriteFile]:
    return [WriteFile(folder / str(index)) for index in range(number)]


def begun(folder: Path) -> list[str]:
    path = folder / "begun.txt"
    return sorted(path.read_text().split()) if path.exists() else []


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "It did not happen in time."
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def dask(command: str, *options: str, folder: Path) -> Generator[None]:
    """Run a scheduler or workers of Dask."""
    program = (sys.executable, "-P", "-m", f"distributed.cli.{command}", "--host", "127.0.0.1", "--no-dashboard")
    with (
        (folder / "log.txt").open("ab") as log,
        subprocess.Popen((*program, *options), env=ENVIRONMENT, stdout=log, stderr=log) as child,
    ):
        try:
            yield
        finally:
            child.terminate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The scheduler file of a cluster of two workers, which start again when they are killed."""
    folder = tmp_path_factory.mktemp("cluster")
    path = folder / "scheduler.json"
    file = ("--scheduler-file", str(path), "--dashboard-address", "127.0.0.1:0")
    with dask("dask_scheduler", *file, "--port", "0", folder=folder):
        wait_until(lambda: path.exists() and path.read_text().endswith("}"))
        with dask("dask_worker", *file, "--nthreads", "1", "--nworkers", "2", folder=folder):
            with distributed.Client(scheduler_file=path, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=SECONDS)
            yield str(path)


@pytest.fixture(params=["processes", "cluster"])
def place(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Where to run jobs, two at a time."""
    return {"executor": request.getfixturevalue("cluster")} if request.param == "cluster" else {"num_processes": 2}


def test_every_job_is_made_once(place: Mapping[str, Any], tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 5)

    def together(job: WriteFile) -> None:
        """The first two wait for each other, which they can only do on two workers."""
        if job.file.name in "01":
            (tmp_path / f"{job.file.name}.there").touch()
            wait_until((tmp_path / f"{1 - int(job.file.name)}.there").exists)
        write(job)

    assert set(run_jobs(together, jobs, **place)) == set(jobs)
    processes = {job.file.read_text() for job in jobs}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    assert set(run_jobs(write, jobs, num_processes=1)) == set(jobs), "what is done is yielded, and not made again"
    assert begun(tmp_path) == ["0", "1", "2", "3", "4"]


def test_an_error_lets_other_jobs_finish_and_begins_no_more(place: Mapping[str, Any], tmp_path: Path) -> None:
    def fail(job: WriteFile) -> None:
        if job.file.name == "1":
            (tmp_path / "failed").touch()
            raise ZeroDivisionError("one over zero")
        wait_until((tmp_path / "failed").exists)
        write(job)

    with pytest.raises(ZeroDivisionError, match="one over zero"):
        list(run_jobs(fail, jobs_in(tmp_path, 20), **place))
    assert len(begun(tmp_path)) < 10


def test_no_job_begins_after_the_deadline(place: Mapping[str, Any], tmp_path: Path) -> None:
    jobs, now = jobs_in(tmp_path, 3), time.monotonic()
    assert not list(run_jobs(write, jobs, deadline=now, **place))
    assert not list(run_jobs(write, jobs, deadline=now, num_processes=1))
    assert not begun(tmp_path)
    assert len(list(run_jobs(write, jobs, deadline=now + 3600, num_processes=1))) == 3
    assert {job.file.read_text() for job in jobs} == {str(os.getpid())}


def test_a_lock_is_granted_to_one_at_a_time(tmp_path: Path) -> None:
    file, held, most = tmp_path / "result", [0], [0]

    def try_it(_: int) -> None:
        with lock(file) as is_granted:
            if is_granted:
                held[0] += 1
                most[0] = max(most[0], held[0])
                time.sleep(0)
                held[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_it, range(400)))
    assert most == [1]
    with lock(file) as first, lock(file) as second, lock(tmp_path / "another") as other:
        assert (first, second, other) == (True, False, True)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
    command = [sys.executable, "-c", f"{hold} time.sleep(60)", str(tmp_path / ".result.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with lock(tmp_path / "result") as is_granted:
            assert not is_granted
        holder.kill()
    with lock(tmp_path / "result") as is_granted:
        assert is_granted


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder is gone"), lock(tmp_path / "gone" / "result"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["made", "given up", "deadline"])
def test_a_job_of_another_process_comes_last(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    jobs = jobs_in(tmp_path, 3)
    with lock(jobs[0].file):
        deadline = time.monotonic() + 0.2 if end == "deadline" else None
        run = run_jobs(write, jobs, num_processes=1, deadline=deadline)
        assert [next(run), next(run)] == jobs[1:]
        if end == "deadline":
            assert not list(run)
        if end == "made":
            jobs[0].file.write_text("made there")
    assert list(run) == ([] if end == "deadline" else jobs[:1])
    assert end != "made" or jobs[0].file.read_text() == "made there"


SCRIPT = """
import dataclasses, os, signal, time
from pathlib import Path
from wnn_jax.lab.jobs import run_jobs

@dataclasses.dataclass(frozen=True)
class Wait:
    file: Path
    def is_done(self):
        return False

def wait(job):
    job.file.with_suffix(f".{os.getpid()}.begun").touch()
    time.sleep(600)

if __name__ == "__main__":
    # A shell starts what runs in the background with interrupts ignored, such as these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(run_jobs(wait, [Wait(Path.cwd() / str(index)) for index in range(2)], num_processes=2))
"""


@pytest.mark.slow_but(1)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Processes are looked up as Linux does.")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_script_that_ends_leaves_no_process(end: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
        processes = {int(path.name.split(".")[1]) for path in tmp_path.glob("*.begun")}
        assert all(map(is_alive, processes))
        # A terminal interrupts the whole group.
        (os.killpg if end == signal.SIGINT else os.kill)(script.pid, end)
        script.communicate(timeout=SECONDS)
        wait_until(lambda: not any(map(is_alive, processes)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_of_a_cluster_loses_no_run(cluster: str, tmp_path: Path) -> None:
    def die_once(job: WriteFile) -> None:
        if job.file.name == "0" and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write(job)

    jobs = jobs_in(tmp_path, 4)
    assert set(run_jobs(die_once, jobs, executor=cluster)) == set(jobs)


@pytest.mark.slow_but(1)
def test_a_job_that_kills_its_workers_is_told(place: Mapping[str, Any], tmp_path: Path) -> None:
    def die(job: WriteFile) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    what = "tried on 2 workers of --executor .*scheduler.json" if "executor" in place else "ended abruptly"
    with pytest.raises(UsageError, match=f"{what}.*Finished runs are kept"):
        list(run_jobs(die, jobs_in(tmp_path, 1), **place))


def test_workers_of_several_threads_are_refused(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.Client, "nthreads", lambda _: {"tcp://worker": 2})
    with pytest.raises(UsageError, match=r"tcp://worker .* has 2 threads.*--nthreads 1"):
        list(run_jobs(write, jobs_in(tmp_path, 2), executor=cluster))


def test_a_scheduler_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_SECONDS_TO_CONNECT", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # Nobody listens.
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"--executor {address} cannot be reached"):
            list(run_jobs(write, jobs_in(tmp_path, 1), executor=address))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "threads"}, "--executor 'threads' is not known. Give the address"),
        ({"executor": "missing/scheduler.json"}, "--executor missing/scheduler.json does not exist. Start"),
        ({"executor": "other://host:1"}, "--executor other://host:1 cannot be reached"),
        ({"executor": "tcp://host:1", "num_processes": 2}, "--num-processes 2 counts processes of this machine"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        list(run_jobs(write, jobs_in(tmp_path, 1), **options))


def test_a_cluster_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'wnn-jax\[cluster\]'"):
        list(run_jobs(write, jobs_in(tmp_path, 1), executor="tcp://127.0.0.1:1"))
