"""Trees of arrays: dtypes, differences, norms, and conditionals that survive `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
import optax

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


def wide_dtype(array: Any) -> Any:
    """The dtype to compute differences of such arrays in: float32 at least."""
    return jnp.promote_types(jnp.result_type(array), jnp.float32)


def difference(param: jax.Array, earlier: jax.Array) -> jax.Array:
    """How far a parameter has moved since, in float32 or wider."""
    dtype = wide_dtype(earlier)
    return param.astype(dtype) - earlier.astype(dtype)


def apply_updates(params: Any, updates: Any) -> Any:
    """The parameters after an update, as `optax.apply_updates` makes them, and surely rounded to their dtype.

    A compiler may keep more than bfloat16 has of what it goes on working with, and so move a weight that stays.
    """

    def rounded(array: jax.Array) -> jax.Array:
        limits = jnp.finfo(array.dtype)
        return array if limits.bits >= 32 else jax.lax.reduce_precision(array, limits.nexp, limits.nmant)

    return jax.tree.map(rounded, optax.apply_updates(params, jax.tree.map(rounded, updates)))


def all_finite(tree: Any) -> jax.Array:
    """Whether there is no NaN and no infinity in a tree."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees; under `vmap`, for every member its own."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


@jax.custom_batching.custom_vmap
def any_member(predicate: jax.Array) -> jax.Array:
    """The predicate itself; under `vmap`, one unbatched scalar: whether it holds for any member of the batch.

    `vmap` turns a conditional on a batched predicate into a select, which runs both branches at every step. With
    `lax.cond(any_member(predicate), write, keep, ...)` it stays a conditional, and `write` runs when some member is to
    write: it must itself leave those members as they are for which `predicate` is false.

    Args:
      predicate: a bool scalar.

    Returns:
      A bool scalar.
    """
    return predicate


@any_member.def_vmap
def _any_member_vmap(axis_size: int, in_batched: list[bool], predicate: jax.Array) -> tuple[jax.Array, bool]:  # pyright: ignore[reportUnusedFunction]
    del axis_size
    return any_member(jnp.any(predicate, axis=0) if in_batched[0] else predicate), False
