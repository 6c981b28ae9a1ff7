"""Stands in for `wnn_jax.lab.jobs`. Replace this module by `lock` and `run_jobs` of that module."""

import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wnn_jax.lab.jobs_claims import claim as lock
from wnn_jax.lab.jobs_claims import run_shared


class _SharedJob(NamedTuple):
    job: Any

    @property
    def files(self) -> Sequence[Path]:
        return [self.job.file]


def run_jobs(function: Callable[[Any], Any], jobs: Sequence[Any], **options: Any) -> Generator[Any, None, None]:
    """Run a function for every job that is not done, and yield each job when its result exists."""
    for shared in run_shared(functools.partial(_call, function), [_SharedJob(job) for job in jobs], **options):
        yield shared.job


def _call(function: Callable[[Any], Any], shared: _SharedJob) -> None:
    with lock(shared.job.file) as is_granted:
        if is_granted and not shared.job.is_done():
            function(shared.job)
