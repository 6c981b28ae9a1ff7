"""Runs the Python blocks of README.md and of the guides as they stand, in one namespace per page, by Sybil."""

import contextlib
import io
import re
from collections.abc import Iterator

import jax
import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

# What a comment behind a `print` says, up to a colon: `print(1 + 1)  # 2: the sum`.
_PROMISE = re.compile(r"^ *print\(.*\)  # (.*?)(?:: .*)?$", re.MULTILINE)
_run = PythonEvaluator()


def _evaluate(example: Example) -> str | None:
    """Runs a block with the defaults that a user has; returns in what it does not print what it promises."""
    output = io.StringIO()
    with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(output):
        _run(example)
    promised, printed = _PROMISE.findall(example.parsed), output.getvalue().splitlines()
    return f"promised to print {promised}, printed {printed}" if promised and promised != printed else None


@pytest.fixture(scope="module")
def few_optimizations(pytestconfig: pytest.Config) -> Iterator[None]:
    """For what takes long to compile, and nothing to run. With the slow tests all programs are as a user has them."""
    jax.config.update("jax_disable_most_optimizations", "not slow" in pytestconfig.option.markexpr)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", _evaluate)],
    patterns=["README.md", "docs/guides/*.md"],
    fixtures=["few_optimizations"],
).pytest()
