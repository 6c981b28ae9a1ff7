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


def run_key(description: Mapping[str, Any], version: int | None = None) -> str:
    """Return the SHA-256 of a configuration, in hexadecimal digits.

    A description has no source code and no traced program. So a better docstring or a faster operation keeps the
    results that exist. `version` is the `RESULTS_VERSION` of a result; by default it is the present version.
    """
    content = {"results_version": RESULTS_VERSION if version is None else version, **description}
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
    """List where two descriptions differ, one line for each place. `name` is their place in a larger description."""
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
    return {package.__name__: package.__version__ for package in (wnn_jax, jax, flax, optax, np)}


def made_by() -> dict[str, Any]:
    """Return the code, the versions and the machine of this process. Results show them, and keys do not hash them."""
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
