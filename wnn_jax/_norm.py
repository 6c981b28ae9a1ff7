"""Norms of trees, of which no square overflows or vanishes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._history import wide_dtype

# Of leaves with no more weights than this, which take little memory, a compiler chooses the order, and is done sooner.
_SMALL = 2**16


def norm(array: jax.Array) -> jax.Array:
    """The norm of an array of float32 or wider."""
    return norms(array)[0]


def norms(tree: Any) -> jax.Array:
    """The norm of each leaf, `[leaves]`, in float32 or wider.

    What is a number of a leaf is computed for all of them at once.
    """
    leaves = [leaf.astype(wide_dtype(leaf)) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros([0])
    limits = [jnp.finfo(leaf.dtype) for leaf in leaves]
    # Neither the scale nor its reciprocal, by which a compiler may multiply, is denormal.
    low = np.array([float(limit.smallest_normal) for limit in limits])
    high = np.array([float(limit.max) / 8 for limit in limits])
    largest = _one_by_one(lambda leaf: jnp.max(jnp.abs(leaf), initial=0), leaves)
    scales = jax.lax.optimization_barrier(jnp.clip(largest, low.astype(largest.dtype), high.astype(largest.dtype)))
    scaled = [leaf / scale.astype(leaf.dtype) for leaf, scale in zip(leaves, scales, strict=True)]
    return scales * jnp.sqrt(_one_by_one(lambda leaf: jnp.sum(jnp.square(leaf)), scaled))


def following(known: jax.Array, array: Any, leaf: jax.Array) -> jax.Array:
    """The array, and not before a number that is never negative is known, unless the leaf that it is of is small.

    What reductions read is written first on some devices. One after the other they use the same memory.
    """
    if leaf.size <= _SMALL:
        return array
    # A sum with zero, which a compiler cannot tell.
    return array + jnp.minimum(known, 0).astype(jnp.result_type(array))


def _one_by_one(reduction: Callable[[jax.Array], jax.Array], leaves: list[jax.Array]) -> jax.Array:
    """A number of each leaf that is never negative, of large ones one after the other: `[leaves]`."""
    found: list[jax.Array] = []
    for leaf in leaves:
        found.append(reduction(following(found[-1], leaf, leaf) if found else leaf))
    return jnp.stack(found)
