"""Runs the Python blocks of README.md and of the guides as they stand, in one namespace per page, by Sybil."""

import contextlib
import io
import os
import re
from typing import Any

import hypothesis
import jax
import pytest
from jax._src import compiler  # There is no public way to give an option to all programs, and to take it back.
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

# What a comment behind a `print` says, up to a colon: `print(1 + 1)  # 2: the sum`.
_PROMISE = re.compile(r"^ *print\(.*\)  # (.*?)(?:: .*)?$", re.MULTILINE)
_run = PythonEvaluator()
_get_compile_options = compiler.get_compile_options

# Always the same few examples, or many new ones: `HYPOTHESIS_PROFILE=campaign`, see `tests/properties/strategies.py`.
_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {"max_examples": 20, "derandomize": True},
    "campaign": {"max_examples": 2000},
}
for _name, _settings in _PROFILES.items():
    too_slow = [hypothesis.HealthCheck.too_slow]  # On a busy machine, drawing is slow.
    hypothesis.settings.register_profile(
        _name, deadline=None, print_blob=True, suppress_health_check=too_slow, **_settings
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def _evaluate(example: Example) -> str | None:
    """Runs a block with the defaults that a user has; returns in what it does not print what it promises."""
    output = io.StringIO()
    with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(output):
        _run(example)
    promised, printed = _PROMISE.findall(example.parsed), output.getvalue().splitlines()
    return f"promised to print {promised}, printed {printed}" if promised and promised != printed else None


def pytest_configure(config: pytest.Config) -> None:
    """Without the slow tests most of the time is spent on compiling; with them programs are as a user has them."""
    jax.config.update("jax_disable_most_optimizations", "not slow" in config.option.markexpr)
    compiler.get_compile_options = _quick_compile_options


def _quick_compile_options(*args: Any, **settings: Any) -> Any:
    """What JAX gives to XLA; without optimizations also without the emitters of fusions, half of the time on CPUs."""
    options = _get_compile_options(*args, **settings)
    if jax.config.read("jax_disable_most_optimizations") and jax.default_backend() == "cpu":
        options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
    return options


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", _evaluate)],
    patterns=["README.md", "docs/guides/*.md"],
).pytest()
