"""The mean and the standard deviation of whole tensors, and the unit in which no square overflows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype
from wnn_jax.nowcasters._chunks import Chunks


class Scale(NamedTuple):
    """The mean and the unbiased standard deviation of all values in the history of a tensor, or arrays of these."""

    mean: Any
    std: Any


def standardize(values: Any, scale: Scale) -> Any:
    """Return values in standard deviations from the mean (Knyazev et al., ICLR 2025; the constant is from its code)."""
    return (values - scale.mean) / (scale.std + 1e-6)


def scales_of(chunks: Chunks, num_snapshots: int, mesh_axes: tuple[str, ...] = ()) -> Scale:
    """Return the scale of every leaf, arrays `[leaves]`; chunks are of shards over the `mesh_axes`."""
    dtype = wide_dtype(chunks.dtype)
    counts = num_snapshots * jax.lax.psum(1, mesh_axes) * chunks.counts().astype(dtype)
    # Values are measured from one value, so that a tensor that does not vary has a deviation of exactly zero.
    anchors = jax.lax.pmax(chunks.firsts().astype(dtype), mesh_axes)

    def distance(snapshot: jax.Array, anchor: jax.Array) -> jax.Array:
        return jnp.abs(snapshot.astype(dtype) - anchor)

    units = units_of(jax.lax.pmax(chunks.fold(distance, [anchors], largest=True), mesh_axes))

    def value(snapshot: jax.Array, anchor: jax.Array, unit: jax.Array) -> jax.Array:
        return (snapshot.astype(dtype) - anchor) / unit

    def square(snapshot: jax.Array, anchor: jax.Array, unit: jax.Array, mean: jax.Array) -> jax.Array:
        return (value(snapshot, anchor, unit) - mean) ** 2

    means = jax.lax.psum(chunks.fold(value, [anchors, units], largest=False), mesh_axes) / counts
    squares = jax.lax.psum(chunks.fold(square, [anchors, units, means], largest=False), mesh_axes)
    return Scale(anchors + units * means, units * jnp.sqrt(squares / (counts - 1)))


def units_of(largest: Any) -> Any:
    """Return powers of two of the size of the largest absolute values, NumPy or JAX arrays of float32 or wider."""
    xp = np if isinstance(largest, np.ndarray) else jnp
    limits = jnp.finfo(largest.dtype)
    # Neither a unit nor its reciprocal, by which a compiler may multiply, is denormal.
    exponents = xp.clip(xp.frexp(largest)[1] - 1, limits.minexp + 1, limits.maxexp - 4)
    return xp.ldexp(xp.ones_like(largest), exponents)
