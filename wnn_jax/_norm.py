"""Norms of trees, of which no square overflows or vanishes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._history import wide_dtype


def norms(tree: Any) -> list[jax.Array]:
    """The norm of each leaf, in float32 or wider."""
    return [_norm(leaf.astype(wide_dtype(leaf))) for leaf in jax.tree.leaves(tree)]


def total(of_leaves: Sequence[jax.Array]) -> jax.Array:
    """The norm of all leaves together, from the norm of each."""
    return _norm(jnp.stack(of_leaves)) if of_leaves else jnp.zeros([])


def _norm(array: jax.Array) -> jax.Array:
    if array.size == 0:
        return jnp.zeros([], array.dtype)
    limits = jnp.finfo(array.dtype)
    # Neither the scale nor its reciprocal, by which a compiler may multiply, is denormal.
    scale = jnp.clip(jnp.max(jnp.abs(array)), limits.smallest_normal, limits.max / 8)
    return scale * jnp.sqrt(jnp.sum(jnp.square(array / scale)))
