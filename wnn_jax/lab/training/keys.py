"""The key of a result: one hash of the configuration that made it."""

import dataclasses
import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import wnn_jax

# Raise it when the numbers of a run change on purpose. Results of another version are stale.
RESULTS_VERSION = 1


def run_key(description: Mapping[str, Any]) -> str:
    """Hash a configuration.

    Args:
      description: the task, the method, the learning rate, the seed and the steps, in types that JSON has. No source
        code and no traced program: a better docstring or a faster operation keeps the results that exist.

    Returns:
      A SHA-256 in hexadecimal digits. It covers `RESULTS_VERSION` too.
    """
    content = {"results_version": RESULTS_VERSION, **description}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(value: Any) -> Any:
    """Describe a setting in types that JSON has: a dataclass by its fields, a function by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": describe(value.func), "arguments": describe([*value.args, value.keywords])}
    return value.__qualname__ if callable(value) else value


def describe_differences(old: Any, new: Any, name: str = "") -> list[str]:
    """List where two descriptions differ, one line for each place.

    Args:
      old: the description of a result that exists.
      new: the description of the run that is wanted.
      name: the place of both in a larger description.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in describe_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    is_same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if is_same else [f"{name} was {_shorten(old)} and is {_shorten(new)}"]


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute a result."""
    return {
        "wnn_jax": wnn_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
    }


def made_by() -> dict[str, Any]:
    """Return what makes results in this process: code, versions and machine. It is shown with a result, not hashed."""
    device = jax.devices()[0]
    return {
        **versions(),
        "commit": _commit(),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "machine": platform.machine(),
    }


@functools.cache
def _commit() -> str | None:
    """Return the commit of a clone, or `None` for an installed package."""
    folder = Path(__file__).parents[3]
    if not (folder / ".git").exists():
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
