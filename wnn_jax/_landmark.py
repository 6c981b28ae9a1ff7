"""Noticing that the parameters are not where the last update led: that something else has moved them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._trees import apply_updates

# Some small tensors are enough, for what comes after this transformation in a chain changes all of them, and so does a
# model that is restored or edited. Every step reads them.
_NUM_TENSORS = 4
_SMALL = 1024
# What is further from where it was left than this share of the last update was moved by something else.
_SHARE = 0.25
# Rounding, in units of the last place: of weights in their own dtype, and of sums in float32.
_ROUNDING = 4.0
_ROUNDING_OF_SUMS = 16.0

MISPLACED = (
    "the parameters are not where the last update of wnn_jax.nowcast led: a transformation after it in the chain "
    "changes its updates, or the parameters were edited, or restored without the state of the optimizer. Put nowcast "
    "last in the chain. Its history began anew; NowcastState.num_misplaced counts such steps."
)


class Landmark(NamedTuple):
    """Where the parameters were left.

    Attributes:
      position: float32 `[tensors, 3]`; see `position_of`.
      tolerance: float32, how far from there they may be found. Infinite at the beginning, when nothing is known.
    """

    position: jax.Array
    tolerance: jax.Array

    @classmethod
    def unknown(cls, params: Any) -> "Landmark":
        """A landmark that is found anywhere."""
        return cls(jnp.zeros([len(_small_leaves(params)), 3], jnp.float32), jnp.full([], jnp.inf, jnp.float32))

    @classmethod
    def of_step(cls, params: Any, updates: Any, position: jax.Array) -> "Landmark":
        """Where updates lead from parameters at a position."""
        chosen = _small_leaves(params)
        before, by = ([jax.tree.leaves(tree)[index] for index in chosen] for tree in (params, updates))
        after = apply_updates(before, by)
        there = _position(after)
        largest = jnp.where(_is_known(there), jnp.max(jnp.abs(there[:, 1:]), axis=1), 0)
        rounding = jnp.array([_rounding(leaf) for leaf in after], jnp.float32) * largest
        return cls(there, _SHARE * _distance(there, position) + jnp.sum(rounding))

    def is_missed(self, position: jax.Array) -> jax.Array:
        """Whether parameters at a position are somewhere else: a bool scalar."""
        is_far = _distance(position, self.position) > self.tolerance
        # Tensors that are finite again after a step that was not have been moved, too.
        return is_far | jnp.any(_is_known(position) & ~_is_known(self.position))


def position_of(params: Any) -> jax.Array:
    """Where parameters are: the sum, the maximum and the minimum of a few small tensors, float32 `[tensors, 3]`."""
    leaves = jax.tree.leaves(params)
    return _position([leaves[index] for index in _small_leaves(params)])


def _small_leaves(params: Any) -> list[int]:
    """The places of a few of the small leaves, from all over a tree; or of the smallest, if there are no small ones."""
    sizes = [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
    least = min((size for size in sizes if size), default=0)
    small = [index for index, size in enumerate(sizes) if 0 < size <= max(least, _SMALL)]
    return small[:: max(-(-len(small) // _NUM_TENSORS), 1)]


def _position(tensors: list[jax.Array]) -> jax.Array:
    # Three numbers for a tensor are all that devices exchange, whatever the sharding, and none needs more than reading.
    positions = [
        jnp.stack([jnp.sum(tensor, dtype=jnp.float32), *(fn(tensor).astype(jnp.float32) for fn in (jnp.max, jnp.min))])
        for tensor in tensors
    ]
    return jnp.stack(positions) if positions else jnp.zeros([0, 3], jnp.float32)


def _is_known(position: jax.Array) -> jax.Array:
    """Of which tensors the position is known: `[tensors]`. It is not where a weight is not finite."""
    return jnp.all(jnp.isfinite(position), axis=1)


def _distance(position: jax.Array, other: jax.Array) -> jax.Array:
    """How far two positions are apart in the tensors of which both are known."""
    is_known = _is_known(position) & _is_known(other)
    return jnp.linalg.norm(jnp.where(is_known[:, None], position - other, 0))


def _rounding(tensor: jax.Array) -> float:
    """How far from its position a tensor may be found by rounding alone, beside its largest weight."""
    # The errors of weights, which are independent, add up as their squares do.
    of_weights = _ROUNDING * float(jnp.finfo(tensor.dtype).eps) * math.sqrt(tensor.size)
    return of_weights + _ROUNDING_OF_SUMS * float(jnp.finfo(jnp.float32).eps) * tensor.size
