"""How the snapshots of a window are kept: whole trees of the parameters' own shapes and shardings."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Trees like the parameters rather than one stacked tree: sharding metadata made for the parameters is right for each
# of them, and no leaf loses its sharding in a stack.
History = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class HistoryFormat:
    """How snapshots are kept.

    Attributes:
      num_snapshots: how many there are.
      dtype: `None`, to keep all of them as the parameters are; or a dtype in which those after the first are kept as
        their differences from it, where that is narrower than the parameter is.
      memory_kind: `None`, to keep them where the parameters are, or the kind of memory to keep them in.
    """

    num_snapshots: int
    dtype: Any = None
    memory_kind: Literal["pinned_host"] | None = None

    def init(self, params: Any) -> History:
        """Empty snapshots, each in buffers of its own so that the state can be donated."""

        def empty(param: Any, index: int) -> jax.Array:
            return self._put_away(jnp.zeros_like(param, dtype=self._dtype(param, index)))

        return tuple(
            jax.tree.map(lambda param, index=index: empty(param, index), params) for index in range(self.num_snapshots)
        )

    def write(self, history: History, slot: jax.Array, params: Any) -> History:
        """The history with `params` in place of the snapshot at `slot` (int32, 0 is the oldest)."""

        def write_leaf(index: int, new: jax.Array, old: jax.Array) -> jax.Array:
            return self._put_away(jnp.where(slot == index, new, self._fetch(old)))

        def write_difference(index: int, param: jax.Array, first: jax.Array, old: jax.Array) -> jax.Array:
            is_difference = old.dtype != param.dtype
            new = _difference(param, self._fetch(first)).astype(old.dtype) if is_difference else param
            return write_leaf(index, new, old)

        # From the first snapshot as it is afterwards: were it needed as it was before, every step would copy it.
        first = jax.tree.map(functools.partial(write_leaf, 0), params, history[0]) if history else ()
        return tuple(
            jax.tree.map(functools.partial(write_difference, index), params, first, snapshot) if index else first
            for index, snapshot in enumerate(history)
        )

    def read(self, history: History) -> History:
        """The snapshots, as trees of the parameters' own dtypes."""
        history = jax.tree.map(self._fetch, history)
        if self.dtype is None or not history:
            return history

        def restore(first: jax.Array, kept: jax.Array) -> jax.Array:
            if kept.dtype == first.dtype:
                return kept
            return (first + kept.astype(_wide_dtype(first))).astype(first.dtype)

        return (history[0], *(jax.tree.map(restore, history[0], snapshot) for snapshot in history[1:]))

    def _dtype(self, param: Any, index: int) -> Any:
        dtype = jnp.result_type(param)
        if index == 0 or self.dtype is None or jnp.finfo(dtype).bits <= jnp.finfo(self.dtype).bits:
            return dtype
        return self.dtype

    def _put_away(self, array: jax.Array) -> jax.Array:
        return array if self.memory_kind is None else jax.device_put(array, jax.memory.Space.Host)

    def _fetch(self, array: jax.Array) -> jax.Array:
        return array if self.memory_kind is None else jax.device_put(array, jax.memory.Space.Device)


def _difference(param: jax.Array, first: jax.Array) -> jax.Array:
    dtype = _wide_dtype(first)
    return param.astype(dtype) - first.astype(dtype)


def _wide_dtype(array: jax.Array) -> Any:
    return jnp.promote_types(array.dtype, jnp.float32)
