"""Norms of trees, of which no square overflows or vanishes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._history import wide_dtype


def norm(array: jax.Array) -> jax.Array:
    """The norm of an array of float32 or wider."""
    if array.size == 0:
        return jnp.zeros([], array.dtype)
    limits = jnp.finfo(array.dtype)
    # Neither the scale nor its reciprocal, by which a compiler may multiply, is denormal.
    scale = jnp.clip(jnp.max(jnp.abs(array)), limits.smallest_normal, limits.max / 8)
    return scale * jnp.sqrt(jnp.sum(jnp.square(array / scale)))


def norms(tree: Any) -> list[jax.Array]:
    """The norm of each leaf, in float32 or wider, one after the other."""
    found: list[jax.Array] = []
    for leaf in jax.tree.leaves(tree):
        leaf = leaf.astype(wide_dtype(leaf))
        found.append(norm(following(found[-1], leaf) if found else leaf))
    return found


def following(known: jax.Array, array: Any) -> jax.Array:
    """The array, and not before a number that is never negative is known.

    What reductions read is written first on some devices. One after the other they use the same memory.
    """
    # A sum with zero, which a compiler cannot tell.
    return array + jnp.minimum(known, 0).astype(jnp.result_type(array))


def total(of_leaves: Sequence[jax.Array]) -> jax.Array:
    """The norm of all leaves together, from the norm of each."""
    return norm(jnp.stack(of_leaves)) if of_leaves else jnp.zeros([])
