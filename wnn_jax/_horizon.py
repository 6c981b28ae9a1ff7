"""Horizons, and schedules of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_int

# Up to this float32 has all integers.
_MAX_HORIZON = 2**24


def decaying_horizon(num_nowcasts: int, *, first: int = 40, last: int = 1) -> Callable[[Any], jax.Array]:
    """A schedule for `nowcast(horizon=...)`: far at the beginning of training, near at its end.

    The square root of the horizon falls linearly from `first` to `last`, and stays there.

    Args:
      num_nowcasts: how many nowcasts the training has: its steps divided by `context * snapshot_every`.
      first: the horizon of the first nowcast, in snapshots.
      last: the horizon of the last one, in snapshots.

    Returns:
      A function of the nowcast's index (0 for the first) to an int32 horizon.

    Raises:
      ValueError: if an argument is not an int >= 1.

    Examples:
      >>> import wnn_jax
      >>> schedule = wnn_jax.decaying_horizon(10)
      >>> [int(schedule(index)) for index in range(10)]
      [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """
    num_nowcasts = check_int("num_nowcasts", num_nowcasts, "how many nowcasts the training has", minimum=1)
    first = check_int("first", first, "the horizon of the first nowcast, in snapshots", minimum=1)
    last = check_int("last", last, "the horizon of the last nowcast, in snapshots", minimum=1)
    roots = np.linspace(np.sqrt(first), np.sqrt(last), num_nowcasts)
    horizons = np.round(roots**2).astype(np.int32)
    return lambda index: jnp.asarray(horizons)[jnp.clip(index, 0, num_nowcasts - 1)]


def clip_horizon(horizon: Any, maximum: int = _MAX_HORIZON) -> jax.Array:
    """Brings a horizon that a schedule made into range.

    Args:
      horizon: a real scalar array. It is rounded; what is not a number is 1.
      maximum: the greatest that it may be.

    Returns:
      An int32 scalar from 1 to `maximum`.

    Raises:
      ValueError: if it is no real scalar.
    """
    horizon = jnp.asarray(horizon)
    if horizon.ndim > 0 or not (jnp.issubdtype(horizon.dtype, jnp.number) and jnp.isrealobj(horizon)):
        raise ValueError(f"horizon is of the type {jax.typeof(horizon)}; an array must be a real scalar.")
    horizon = jnp.round(horizon.astype(jnp.float32))
    return jnp.minimum(jnp.where(horizon >= 1, horizon, 1), maximum).astype(jnp.int32)
