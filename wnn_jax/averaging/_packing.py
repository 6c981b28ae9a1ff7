"""Arrays in few bits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = (1, 2, 4, 8)


class Packed(NamedTuple):
    """Arrays `[n, ...]` in `bits` bits a number.

    Attributes:
      codes: uint8, several codes a byte along the last axis. Sharded like the arrays where that axis divides.
      low: `[n]`, what code 0 stands for.
      step: `[n]`, the distance of two neighbouring codes.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames="bits")
def pack(arrays: jax.Array, bits: int) -> Packed:
    """Rounds each of `n` arrays to evenly spaced values from its least to its greatest.

    A number is off by at most half a step: (greatest - least) / (2^bits - 1) / 2.

    Args:
      arrays: `[n, ...]`.
      bits: 1, 2, 4 or 8 a number.

    References:
      Li et al., Trainable Weight Averaging, 2025
    """
    axes = tuple(range(1, arrays.ndim))
    if arrays.size == 0:
        low = high = jnp.zeros(len(arrays), arrays.dtype)
    else:
        low, high = arrays.min(axis=axes), arrays.max(axis=axes)
    step = (high - low) / (2**bits - 1)
    shape = (-1, *(1 for _ in axes))
    safe = jnp.where(step > 0, step, 1.0)
    codes = jnp.round((arrays - low.reshape(shape)) / safe.reshape(shape)).astype(jnp.uint8)
    per_byte = 8 // bits
    # An axis to pack along, also for scalars.
    codes = codes.reshape(*codes.shape, 1) if codes.ndim == 1 else codes
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = bits * jnp.arange(per_byte, dtype=jnp.uint8)
    packed = jnp.sum(codes << shifts[(None,) * (codes.ndim - 1)], axis=-1, dtype=jnp.uint8)
    return Packed(packed, low, step)


def unpack_one(packed: Packed, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """One of the arrays again.

    Args:
      packed: that array, without the leading axis.
      bits: of a number.
      shape: of the array.
    """
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    codes = packed.codes[..., None] >> shifts[(None,) * packed.codes.ndim] & jnp.uint8(2**bits - 1)
    codes = codes.reshape(*packed.codes.shape[:-1], packed.codes.shape[-1] * (8 // bits))
    codes = codes[..., : shape[-1] if shape else 1]
    return packed.low + packed.step * codes.reshape(shape).astype(packed.low.dtype)
