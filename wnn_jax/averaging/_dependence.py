"""Which checkpoints depend on others linearly, found without keeping any of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import following, wide_dtype

# Far more than there are checkpoints, and a power of 2.
_SKETCH_SIZE = 4096


@jax.jit
def sketch(tree: Any, origin: Any) -> tuple[jax.Array, jax.Array]:
    """A few thousand sums of all weights, by which trees can be told to depend on one another.

    Every weight is in one sum, chosen at random, with a random sign (a count sketch). So inner products of sketches are
    those of the trees on the mean. Dependent trees have dependent sketches, because sums are linear; independent ones
    have independent sketches, unless there are as many trees as sums.

    Args:
      tree: of which the distance from another is sketched. Shards stay where they are.
      origin: the other, or `None` for zero.

    Returns:
      The sums `[sums]`, divided by a size about the largest weight, so that none overflows or vanishes; and that size,
      0 where all weights are.

    References:
      Charikar, Chen and Farach-Colton, `Finding frequent items in data streams
      <https://doi.org/10.1016/S0304-3975(03)00400-6>`_, 2004
    """
    leaves = jax.tree.leaves(tree)
    origins = [None] * len(leaves) if origin is None else jax.tree.leaves(origin)
    # One tensor after the other, in the same memory: each distance is made twice instead of all being kept.
    largest = jnp.float32(0)
    for leaf, other in zip(leaves, origins, strict=True):
        delta = _distance_after(largest, leaf, other)
        largest = jnp.maximum(largest, jnp.max(jnp.abs(delta), initial=0))
    limits = jnp.finfo(narrowest_dtype(jax.eval_shape(distance, tree, origin)))
    # Of a larger number the reciprocal, by which a compiler may multiply instead, would vanish.
    size = jnp.clip(largest, limits.smallest_normal, limits.max / 8)
    sums = jnp.zeros(_SKETCH_SIZE, size.dtype)
    for number, (leaf, other) in enumerate(zip(leaves, origins, strict=True)):
        known = size + jnp.abs(sums[0])
        seed = following(known, jnp.uint32(number), leaf)
        bits = jax.random.bits(jax.random.key(seed), leaf.shape, jnp.uint16)
        delta = _distance_after(known, leaf, other)
        signed = jnp.where(bits % 2 == 0, delta, -delta) / size.astype(delta.dtype)
        sums = sums.at[bits // (2**16 // _SKETCH_SIZE)].add(signed.astype(sums.dtype))
    return sums, jnp.where(largest == 0, 0, size)


def _distance_after(known: jax.Array, leaf: jax.Array, other: jax.Array | None) -> jax.Array:
    """The distance of a leaf from another, or from zero, and not before a number that is never negative is known."""
    # Without the barrier bfloat16 is converted before.
    known, *pair = jax.lax.optimization_barrier((known, leaf, other))
    return distance(*jax.tree.map(lambda array: following(known, array, array), pair))


def distance(tree: Any, origin: Any) -> Any:
    """The distance of a tree from another, or from zero, in float32 or wider."""
    wide = jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), tree)
    if origin is None:
        return wide
    return jax.tree.map(lambda leaf, other: leaf - other.astype(leaf.dtype), wide, origin)


def narrowest_dtype(tree: Any) -> Any:
    """The dtype among those of a tree whose largest number is the least."""
    return min((leaf.dtype for leaf in jax.tree.leaves(tree)), key=lambda dtype: jnp.finfo(dtype).max)


def independent(vectors: np.ndarray, first: Sequence[int] = ()) -> list[int]:
    """Which vectors span the space of all, by Cholesky's method with pivots, in their order.

    Args:
      vectors: `[number, size]` float64.
      first: those that are chosen before any other.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(lengths > 0, lengths, 1)
    left, waiting = units @ units.T, list(first)
    chosen: list[int] = []
    while len(chosen) < len(vectors):
        pivot = waiting.pop() if waiting else int(np.argmax(np.diag(left)))
        # What is below the rounding of float32 sums of squares is not to be told from nothing.
        if left[pivot, pivot] <= 1e-6:
            break
        chosen.append(pivot)
        column = left[:, pivot] / np.sqrt(left[pivot, pivot])
        left -= np.outer(column, column)
        left[pivot] = left[:, pivot] = 0
    return sorted(chosen)
