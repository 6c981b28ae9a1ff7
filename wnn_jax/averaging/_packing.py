"""Arrays stored in few bits a number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (1, 2, 4, 8)


class Packed(NamedTuple):
    """An array in few bits a number, or `n` such arrays, with one more axis in front of each attribute."""

    codes: jax.Array  # uint8, several codes a byte along the last axis. Sharded like the array where that axis divides.
    low: jax.Array  # The value of code 0.
    step: jax.Array  # The difference between the values of neighbouring codes.


def pack(array: jax.Array, bits: int) -> Packed:
    """Round an array of any shape to `2**bits` evenly spaced values from its least to its greatest (Li et al., 2025).

    The error of a number is at most half a step: (greatest - least) / (2^bits - 1) / 2.
    """
    low, high = (array.min(), array.max()) if array.size else (jnp.zeros([], array.dtype),) * 2
    step = (high - low) / (2**bits - 1)
    # Scalars need an axis to pack along.
    codes = jnp.atleast_1d(jnp.round((array - low) / jnp.where(step > 0, step, 1.0)).astype(jnp.uint8))
    per_byte = 8 // bits
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = bits * jnp.arange(per_byte, dtype=jnp.uint8)
    packed = jnp.sum(codes << shifts[(None,) * (codes.ndim - 1)], axis=-1, dtype=jnp.uint8)
    return Packed(packed, low, step)


def unpack(packed: Packed, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Return the array of a shape that `pack` rounded to so many bits."""
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    codes = packed.codes[..., None] >> shifts[(None,) * packed.codes.ndim] & jnp.uint8(2**bits - 1)
    codes = codes.reshape(*packed.codes.shape[:-1], packed.codes.shape[-1] * (8 // bits))
    codes = codes[..., : shape[-1] if shape else 1]
    return packed.low + packed.step * codes.reshape(shape).astype(packed.low.dtype)
