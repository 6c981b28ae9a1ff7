import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wnn_jax.lab import jobs_claims
from wnn_jax.lab.jobs_claims import claim, run_shared

# Holds the lock that a claim is, and nothing else, until it is killed.
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


@dataclasses.dataclass(frozen=True)
class WriteFile:
    file: Path

    @property
    def files(self) -> list[Path]:
        return [self.file]


def write(job: WriteFile) -> None:
    with claim(job.file) as is_granted:
        if is_granted and not job.file.exists():
            job.file.write_text("made here")


@pytest.fixture
def jobs(tmp_path: Path) -> list[WriteFile]:
    return [WriteFile(tmp_path / name) for name in "abc"]


def test_a_claim_is_granted_to_one_at_a_time(tmp_path: Path) -> None:
    file, held, most = tmp_path / "result", [0], [0]

    def try_often() -> None:
        for _ in range(100):
            with claim(file) as is_granted:
                if is_granted:
                    held[0] += 1
                    most[0] = max(most[0], held[0])
                    time.sleep(0)
                    held[0] -= 1

    threads = [threading.Thread(target=try_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    with claim(file) as first, claim(file) as second, claim(tmp_path / "another") as other:
        assert (first, second, other) == (True, False, True)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "result"
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".result.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with claim(file) as is_granted:
            assert not is_granted
        process.kill()
    with claim(file) as is_granted:
        assert is_granted


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder is gone"), claim(tmp_path / "gone" / "result"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_another_one_gave_up_is_made_in_the_end(jobs: list[WriteFile]) -> None:
    with claim(jobs[0].file):
        run = run_shared(write, jobs, num_processes=1)
        assert [next(run), next(run)] == jobs[1:]
    assert list(run) == jobs[:1]
    assert jobs[0].file.read_text() == "made here"


def test_what_another_one_makes_is_left_to_it(jobs: list[WriteFile]) -> None:
    with claim(jobs[0].file):
        run = run_shared(write, jobs, num_processes=1)
        assert [next(run), next(run)] == jobs[1:]
        jobs[0].file.write_text("made there")
    assert list(run) == jobs[:1]
    assert jobs[0].file.read_text() == "made there"


def test_nobody_is_waited_for_after_the_deadline(
    jobs: list[WriteFile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs_claims, "_SECONDS_BETWEEN_LOOKS", 0.01)
    with claim(jobs[0].file):
        assert list(run_shared(write, jobs, num_processes=1, deadline=time.monotonic() + 0.1)) == jobs[1:]
    assert not jobs[0].file.exists()
    assert [f"Waiting for another process, which makes {jobs[0].file}." in line for line in caplog.messages] == [True]
