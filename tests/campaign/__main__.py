"""The command line: `python -m tests.campaign`, a search for cases that the library gets wrong.

python -m tests.campaign --record
"""

import collections
import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import tyro

import wnn_jax
from tests.campaign.part import Part, Verdict
from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError, check_options, one_line_errors
from wnn_jax.lab.jobs import run_all
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.training.keys import environment

PartName = Literal["windows", "schedules", "averages", "files", "kills", "folders"]
PARTS: tuple[PartName, ...] = get_args(PartName)

_FOLDER = Path(__file__).parent
_RECORD = _FOLDER.parents[1] / "benchmarks" / "campaign.txt"
_CASES_PER_JOB = 10


@dataclasses.dataclass(frozen=True)
class Campaign:
    """Search for cases that the library gets wrong, among many that are drawn at random.

    Called again, it goes on: finished cases are kept as long as neither the library nor the campaign is changed.
    """

    parts: tuple[PartName, ...] = PARTS
    """What to search."""
    num_cases: int | None = None
    """How many cases of each part. Default: as many as the part has in a full campaign."""
    first_case: int = 0
    """Number of the first one: with `--num-cases 1` one case alone is seen again."""
    seed: int = 0
    """With its number, what a case is drawn from."""
    num_processes: int | None = None
    """Processes that work side by side. Default: one per core on CPU, one on an accelerator."""
    output: Path = Path("runs/campaign")
    """Folder of what is finished."""
    budget: float | None = None
    """Minutes for each part, after which no further cases are begun."""
    record: bool = False
    """Write the summary to `benchmarks/campaign.txt`."""


class Job(NamedTuple):
    """Some cases of a part.

    Attributes:
      part: its name.
      seed: of the campaign.
      first: the number of the first case.
      stop: the number after the last one.
      output: the folder of what is finished.
      source: a hash of what is tested and of what tests it.
    """

    part: str
    seed: int
    first: int
    stop: int
    output: Path
    source: str

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return self.output / self.part / f"seed-{self.seed}" / f"{self.first:07}-{self.stop - 1:07}.json"

    def result(self) -> dict[str, Any] | None:
        """What came of it, if it is finished and nothing was changed since."""
        if not self.file.exists():
            return None
        result = json.loads(self.file.read_text())
        return result if result["source"] == self.source else None


def main() -> None:
    """Runs the campaign."""
    options = tyro.cli(Campaign, prog="python -m tests.campaign")
    with one_line_errors():
        num_failures = run_campaign(options)
    if num_failures:
        sys.exit(f"{num_failures} failures.")


def run_campaign(options: Campaign) -> int:
    """Runs what is not finished, shows a summary of all, and returns the number of failures.

    Raises:
      UsageError: if an option cannot be used.
    """
    check_options(options, positive=("num_cases", "num_processes", "budget"))
    if options.first_case < 0:
        raise UsageError(f"--first-case {options.first_case} must not be negative.")
    source = _source()
    jobs = [job for name in options.parts for job in _jobs(options, name, source)]
    waiting = [job for job in jobs if job.result() is None]
    num_cases, num_waiting = (sum(job.stop - job.first for job in some) for some in (jobs, waiting))
    num_failures = 0
    with Progress("cases", total=num_cases, completed=num_cases - num_waiting) as progress:
        for name in options.parts:
            of_part = [job for job in waiting if job.part == name]
            deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
            for job, num_new in run_all(run_job, of_part, num_processes=options.num_processes, deadline=deadline):
                num_failures += num_new
                progress.advance(job.stop - job.first, metrics=f"{job.part}, {num_failures} new failures")
    summary, num_failures = _summarize(options, jobs)
    print(summary, end="")
    if options.record:
        with replace_on_success(_RECORD) as temporary:
            temporary.write_text(summary)
    return num_failures


def run_job(job: Job) -> int:
    """Runs some cases, writes what came of them, and returns the number of failures."""
    began = time.perf_counter()
    part = _begin(job.part)
    tally: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    for number in range(job.first, job.stop):
        verdict = run_case(part, job.seed, number)
        tally.update({name: int(count) for name, count in verdict.tally.items()})
        failures += [f"{job.part}, seed {job.seed}, case {number}: {failure}" for failure in verdict.failures]
    seconds = time.perf_counter() - began
    job.file.parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(job.file) as temporary:
        content = {"source": job.source, "seconds": seconds, "tally": tally, "failures": failures}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return len(failures)


def run_case(part: Part, seed: int, number: int) -> Verdict:
    """Draws a case, and judges it. What is raised or warned of is a failure."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return part.check(np.random.default_rng([seed, number]), Path(folder))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            return Verdict({}, (f"{type(error).__name__} at {place}: {error}",))


@functools.lru_cache(maxsize=1)
def _begin(name: str) -> Part:
    """Loads a part, and frees what was compiled for another: a process can have only so many programs."""
    jax.clear_caches()
    return load_part(name)


def load_part(name: str) -> Part:
    """The part of this name."""
    return importlib.import_module(f"tests.campaign.{name}").PART


def _jobs(options: Campaign, name: str, source: str) -> list[Job]:
    num_cases = options.num_cases or load_part(name).num_cases
    stop = options.first_case + num_cases
    return [
        Job(name, options.seed, first, min(first + _CASES_PER_JOB, stop), options.output, source)
        for first in range(options.first_case, stop, _CASES_PER_JOB)
    ]


def _source() -> str:
    digest = hashlib.sha256()
    for folder in (Path(wnn_jax.__file__).parent, _FOLDER):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _summarize(options: Campaign, jobs: Sequence[Job]) -> tuple[str, int]:
    """The summary of finished jobs, and the number of failures in it."""
    described = ", ".join(f"{name} {value}" for name, value in environment().items())
    lines = [
        f"{datetime.date.today()}, seed {options.seed}, source {jobs[0].source[:12]}",
        described,
        "",
        f"{'part':>12}{'cases':>10}{'failures':>10}{'seconds':>10}  tally",
    ]
    failures: list[str] = []
    for name in options.parts:
        of_part = [job for job in jobs if job.part == name]
        finished = [(job, result) for job in of_part if (result := job.result()) is not None]
        results = [result for _, result in finished]
        tally = sum((collections.Counter(result["tally"]) for result in results), collections.Counter[str]())
        of_results = [failure for result in results for failure in result["failures"]]
        seconds = sum(result["seconds"] for result in results)
        num_cases = sum(job.stop - job.first for job, _ in finished)
        (first, *others) = [f"{key}: {count:,}" for key, count in sorted(tally.items())] or ["nothing"]
        lines.append(f"{name:>12}{num_cases:>10,}{len(of_results):>10,}{seconds:>10.0f}  {first}")
        lines += [f"{'':42}  {other}" for other in others]
        failures += of_results
    return "\n".join([*lines, "", *failures, ""] if failures else [*lines, ""]), len(failures)


if __name__ == "__main__":
    main()
