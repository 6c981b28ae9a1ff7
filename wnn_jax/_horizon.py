"""Schedules of the horizon."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_int


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
