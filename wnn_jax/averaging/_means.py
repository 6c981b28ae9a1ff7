"""Means of arrays that never leave what they are the means of, by rounding or by overflow."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._trees import wide_dtype


def toward(mean: jax.Array, new: jax.Array, share: Any) -> jax.Array:
    """A mean, in float32 or wider, with a share from 0 to 1 of another array in it."""
    new = new.astype(mean.dtype)
    # Of halves, because a difference could overflow; and a difference, because weights of the two would not sum to 1.
    moved = mean + jnp.asarray(2 * share, mean.dtype) * (new / 2 - mean / 2)
    if jnp.iscomplexobj(moved):
        return moved
    return jnp.clip(moved, jnp.minimum(mean, new), jnp.maximum(mean, new))


def mean_of(arrays: Sequence[jax.Array], number: Any = None) -> jax.Array:
    """The mean of arrays, in float32 or wider; of the first `number` of them, if it is given and at least 1."""
    first, *others = arrays
    mean = first.astype(wide_dtype(first))
    for index, array in enumerate(others, start=1):
        share = 1 / (index + 1)
        mean = toward(mean, array, share if number is None else jnp.where(index < number, share, 0.0))
    return mean
