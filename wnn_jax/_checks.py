"""Argument checks, one function per kind of argument: the same values are accepted, and the same said, everywhere.

Each returns the value as Python's own type: a NumPy scalar would widen what it meets under 64-bit JAX, and cannot be
written as JSON.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Choice = TypeVar("Choice", bound=str | int)


def check_int(
    name: str, value: Any, meaning: str, *, minimum: int, maximum: int | None = None, or_injected: bool = False
) -> int:
    """Checks an integer, of Python or of NumPy.

    Args:
      name: the name of the argument, for the message.
      value: the argument.
      meaning: what the argument is, for the message; without a full stop.
      minimum: the least that it may be.
      maximum: the greatest that it may be, or `None` for no bound.
      or_injected: whether an integer that `optax.inject_hyperparams` keeps in its state will do (see `is_injected`).

    Returns:
      The integer, or the array that was injected.

    Raises:
      ValueError: if it is of another type or out of range.
    """
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
    """Checks a finite number: a float or an integer, of Python or of NumPy.

    Args:
      name: the name of the argument, for the message.
      value: the argument.
      meaning: what the argument is, for the message; without a full stop.
      minimum: the least that it may be.
      above: what it must be greater than.
      below: what it must be less than.
      or_injected: whether a number that `optax.inject_hyperparams` keeps in its state will do (see `is_injected`).

    Returns:
      The number, or the array that was injected.

    Raises:
      ValueError: if it is of another type, not finite, or out of range.
    """
    if or_injected and is_injected(value) and _is_real(value.dtype):
        return value
    is_number = is_int(value) or isinstance(value, (float, np.floating))
    is_good = (
        is_number
        and math.isfinite(value)
        and (minimum is None or value >= minimum)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not is_good:
        limits = ((">=", minimum), (">", above), ("<", below))
        bounds = " and ".join(f"{relation} {limit}" for relation, limit in limits if limit is not None)
        raise ValueError(f"{name}={value!r} must be a finite float{bounds and ' '}{bounds}: {meaning}.")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[Choice], meaning: str) -> Choice:
    """Checks one of a few strings, or of a few integers.

    Args:
      name: the name of the argument, for the message.
      value: the argument.
      choices: what it may be.
      meaning: what the argument is, for the message; without a full stop.

    Returns:
      The choice.

    Raises:
      ValueError: if it is none of these.
    """
    # Not all that can be passed can be compared, and True is equal to 1.
    if not (isinstance(value, str) or is_int(value)) or value not in choices:
        *others, last = map(repr, choices)
        expected = f"one of {', '.join((*others, last))}" if len(others) > 1 else " or ".join((*others, last))
        raise ValueError(f"{name}={value!r} must be {expected}: {meaning}.")
    return choices[choices.index(value)]


def check_bool(name: str, value: Any, meaning: str) -> None:
    """Checks a truth value.

    Args:
      name: the name of the argument, for the message.
      value: the argument.
      meaning: what the argument is, for the message; without a full stop.

    Raises:
      ValueError: if it is neither `True` nor `False`.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False: {meaning}.")


def check_float_dtype(name: str, value: Any, meaning: str) -> None:
    """Checks a floating-point dtype, or what NumPy and JAX take for one.

    Args:
      name: the name of the argument, for the message.
      value: the argument.
      meaning: what the argument is, for the message; without a full stop.

    Raises:
      ValueError: if it is none.
    """
    try:
        # For NumPy `None` is float64.
        is_float = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"{name}={value!r} must be a floating-point dtype, such as jnp.bfloat16: {meaning}.")


def is_int(value: Any) -> bool:
    """Whether a value is an integer of Python or of NumPy; truth values are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_injected(value: Any) -> bool:
    """Whether `optax.inject_hyperparams` keeps this value in its state, so that only its type is known."""
    return isinstance(value, jax.Array) and value.ndim == 0


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
