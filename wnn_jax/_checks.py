"""Argument checks, one function per kind of argument, so that every module accepts the same values.

The message of the `ValueError` has the argument's name, value and meaning. Each function returns Python's own type: a
NumPy scalar would widen other numbers under 64-bit JAX, and JSON cannot hold it. With `or_injected`, a scalar array
passes unchanged: `optax.inject_hyperparams` keeps such values in its state.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_REAL = (jnp.integer, jnp.floating)

Choice = TypeVar("Choice", bound=str | int)


def check_int(
    name: str, value: Any, meaning: str, *, minimum: int, maximum: int | None = None, or_injected: bool = False
) -> int:
    """Check an integer of Python or NumPy, from `minimum` to `maximum`."""
    if or_injected and is_injected(value) and jnp.issubdtype(value.dtype, jnp.integer):
        return value
    if not is_int(value) or value < minimum or (maximum is not None and value > maximum):
        bounds = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name}={value!r} must be an int {bounds}: {meaning}.")
    return int(value)


def check_float(
    name: str,
    value: Any,
    meaning: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    or_injected: bool = False,
) -> float:
    """Check a finite number of Python or NumPy: at least `minimum`, greater than `above` and less than `below`."""
    if or_injected and is_injected(value) and any(jnp.issubdtype(value.dtype, kind) for kind in _REAL):
        return value
    relations = ((">=", operator.ge, minimum), (">", operator.gt, above), ("<", operator.lt, below))
    limits = [(symbol, holds, limit) for symbol, holds, limit in relations if limit is not None]
    is_finite = (is_int(value) or isinstance(value, (float, np.floating))) and math.isfinite(value)
    if not is_finite or not all(holds(value, limit) for _, holds, limit in limits):
        bounds = " and ".join(f"{symbol} {limit}" for symbol, _, limit in limits)
        raise ValueError(f"{name}={value!r} must be a finite float{bounds and ' '}{bounds}: {meaning}.")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[Choice], meaning: str) -> Choice:
    """Check that a value is one of a few strings or integers."""
    # Not all that can be passed can be compared, and True is equal to 1.
    if not (isinstance(value, str) or is_int(value)) or value not in choices:
        *others, last = map(repr, choices)
        expected = f"one of {', '.join((*others, last))}" if len(others) > 1 else " or ".join((*others, last))
        raise ValueError(f"{name}={value!r} must be {expected}: {meaning}.")
    return choices[choices.index(value)]


def check_bool(name: str, value: Any, meaning: str) -> None:
    """Check that a value is `True` or `False`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False: {meaning}.")


def check_float_dtype(name: str, value: Any, meaning: str) -> None:
    """Check that NumPy or JAX reads a value as a floating-point dtype."""
    try:
        # NumPy reads `None` as float64.
        is_float = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"{name}={value!r} must be a floating-point dtype, such as jnp.bfloat16: {meaning}.")


def is_int(value: Any) -> bool:
    """Tell whether a value is an integer of Python or NumPy, and no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_injected(value: Any) -> bool:
    """Tell whether a value is a scalar array, as `optax.inject_hyperparams` makes them: only its type is known."""
    return isinstance(value, jax.Array) and value.ndim == 0
