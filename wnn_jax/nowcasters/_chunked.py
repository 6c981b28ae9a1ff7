"""Elementwise functions of whole leaves, a bounded number of elements at a time."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

Arrays = tuple[jax.Array, ...]


def map_in_chunks(fn: Callable[..., jax.Array], arrays: Arrays, chunk_size: int, *operands: Any) -> jax.Array:
    """Applies an elementwise function to arrays of one shape, `chunk_size` elements at a time.

    The temporaries of `fn` exist for one chunk only, whatever the size of the arrays. Where the arrays are
    sharded over explicit mesh axes each device maps its own shard.

    Args:
      fn: an elementwise function `(tuple of [n] arrays, *operands) -> [n] array`.
      arrays: arrays of one shape.
      chunk_size: the largest `n` that `fn` is given.
      *operands: trees of unsharded arrays that every call of `fn` is given whole.

    Returns:
      An array of the shape and dtype of `arrays[0]`.
    """
    sharding = jax.typeof(arrays[0]).sharding
    if all(axis is None for axis in sharding.spec):
        return _map_local(fn, arrays, chunk_size, operands)
    mapped = jax.shard_map(
        lambda shards, operands: _map_local(fn, shards, chunk_size, operands),
        mesh=cast(AbstractMesh, sharding.mesh),
        in_specs=(cast(PartitionSpec, sharding.spec), PartitionSpec()),
        out_specs=cast(PartitionSpec, sharding.spec),
    )
    return mapped(arrays, operands)


def _map_local(fn: Callable[..., jax.Array], arrays: Arrays, chunk_size: int, operands: tuple[Any, ...]) -> jax.Array:
    shape, dtype, size = arrays[0].shape, arrays[0].dtype, arrays[0].size
    flat = tuple(array.reshape(-1) for array in arrays)
    if size <= chunk_size:
        return fn(flat, *operands).astype(dtype).reshape(shape)

    def map_chunk(index: jax.Array, mapped: jax.Array) -> jax.Array:
        # The last chunk overlaps the one before it, so that all have one size and nothing is padded.
        start = jnp.minimum(index * chunk_size, size - chunk_size)
        chunk = tuple(jax.lax.dynamic_slice_in_dim(array, start, chunk_size) for array in flat)
        return jax.lax.dynamic_update_slice_in_dim(mapped, fn(chunk, *operands).astype(dtype), start, axis=0)

    num_chunks = -(-size // chunk_size)
    return jax.lax.fori_loop(0, num_chunks, map_chunk, jnp.zeros_like(flat[0])).reshape(shape)
