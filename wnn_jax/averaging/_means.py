"""Means of arrays that rounding or overflow never takes out of the range of these arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._trees import wide_dtype


def toward(mean: jax.Array, new: jax.Array, share: Any) -> jax.Array:
    """Return a mean, in float32 or wider, in which another array has a share from 0 to 1."""
    new = new.astype(mean.dtype)
    # Halves, because a difference could overflow. A difference, because two rounded weights would not sum to 1.
    moved = mean + jnp.asarray(2 * share, mean.dtype) * (new / 2 - mean / 2)
    if jnp.iscomplexobj(moved):
        return moved
    return jnp.clip(moved, jnp.minimum(mean, new), jnp.maximum(mean, new))


def mean_of(arrays: Sequence[jax.Array], number: Any = None) -> jax.Array:
    """Return the mean of arrays, or of the first `number` of them (at least 1), in float32 or wider."""
    first, *others = arrays
    mean = first.astype(wide_dtype(first))
    for index, array in enumerate(others, start=1):
        share = 1 / (index + 1)
        mean = toward(mean, array, share if number is None else jnp.where(index < number, share, 0.0))
    return mean
