"""How the snapshots of a window are kept: whole trees of the parameters' own shapes, dtypes and shardings."""

from typing import Any

import jax
import jax.numpy as jnp

# Five trees like the parameters rather than one stacked tree: sharding metadata made for the parameters is right
# for each of them, and no leaf loses its sharding in a stack.
History = tuple[Any, ...]


def init_history(params: Any, num_snapshots: int) -> History:
    """Empty snapshots, each in buffers of its own so that the state can be donated."""
    return tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(num_snapshots))


def write_snapshot(history: History, slot: jax.Array, params: Any) -> History:
    """The history with `params` in place of the snapshot at `slot` (int32, 0 is the oldest)."""
    return tuple(
        jax.tree.map(lambda new, old, index=index: jnp.where(slot == index, new, old), params, snapshot)
        for index, snapshot in enumerate(history)
    )
