"""Elementwise functions of many leaves: a bounded number of weights at a time, without moving shards."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_int
from wnn_jax._trees import MeshAxes, map_where_they_are
from wnn_jax._window import LeafHistory, check_length
from wnn_jax.nowcasters._chunks import Chunks, chunks_of
from wnn_jax.nowcasters._scale import scales_of

CONTEXT = 5

_CHUNK_SIZE_ON_CPU = 8192
_CHUNK_SIZE_ELSEWHERE = 2**17


def map_by_role(
    history: Sequence[Any],
    roles: Any,
    predict: Callable[[str, list[LeafHistory]], Sequence[jax.Array]],
    *,
    handled: Iterable[str],
    by_name: bool = False,
) -> Any:
    """Forecasts a tree of parameters from 5 snapshots, all leaves of one role at once.

    Args:
      history: the snapshots, oldest first.
      roles: a tree like the parameters with a role name at each leaf.
      predict: `(role, histories of leaves) -> forecasts`, of the shapes of the leaves.
      handled: the roles to forecast. Leaves of other roles keep their last value.
      by_name: whether to group leaves by their names without numbers, too. Such leaves are sharded alike.

    Returns:
      The forecast: the tree, shapes and dtypes of the parameters.

    Raises:
      ValueError: if there are not 5 snapshots.
    """
    check_length(history, CONTEXT)
    leaf_roles, treedef = jax.tree_util.tree_flatten_with_path(roles)
    # By the tree of the roles: parameters may have a node where the roles have a leaf.
    snapshots = [treedef.flatten_up_to(snapshot) for snapshot in history]
    leaves: list[LeafHistory] = [tuple(map(jnp.asarray, leaf)) for leaf in zip(*snapshots, strict=True)]
    forecast = [leaf[-1] for leaf in leaves]
    known = set(handled)
    groups: dict[tuple[str, str], list[int]] = {}
    for index, (path, role) in enumerate(leaf_roles):
        if role in known:
            name = re.sub(r"\d+", "", jax.tree_util.keystr(path)) if by_name else ""
            groups.setdefault((role, name), []).append(index)
    for (role, _), indices in groups.items():
        predicted = predict(role, [leaves[index] for index in indices])
        for index, leaf in zip(indices, predicted, strict=True):
            forecast[index] = leaf.astype(forecast[index].dtype)
    return jax.tree.unflatten(treedef, forecast)


@dataclasses.dataclass(frozen=True)
class LeafMap:
    """An elementwise function, applied to whole leaves.

    The temporaries of the function exist for one chunk only, whatever the size of the leaves. Each device maps its own
    shards, over explicit and automatic mesh axes alike. One loop maps all leaves of a dtype, up to 8 million weights,
    so that XLA compiles the function once or a few times.

    Attributes:
      fn: `(tuple of [n] arrays, *operands) -> [n] array`, for weights of one or several tensors. It must have no arrays
        of its own: give them as operands.
      chunk_size: the largest `n` for `fn`, or `None` for 8192 on CPU and 131,072 elsewhere.
      needs_scale: whether the first operand of `fn` is the `Scale` of the tensor of each weight, arrays `[n]`.
    """

    fn: Callable[..., jax.Array]
    chunk_size: int | None = None
    needs_scale: bool = False

    def __call__(self, leaves: Sequence[LeafHistory], *operands: Any) -> list[jax.Array]:
        """Applies the function to the histories of leaves, with trees of unsharded arrays as operands.

        Returns:
          For each leaf an array of its shape and dtype.
        """
        return map_where_they_are(lambda _: self.map_shards, leaves, operands)

    def map_shards(
        self, leaves: Sequence[LeafHistory], operands: Any, mesh_axes: Sequence[MeshAxes]
    ) -> list[jax.Array]:
        """Map leaves, or one device's shards of them; see `wnn_jax._trees.MapShards`."""
        mapped = [leaf[0] for leaf in leaves]
        groups: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            if leaf[0].size:
                key = leaf[0].dtype, mesh_axes[index] if self.needs_scale else ()
                groups.setdefault(key, []).append(index)
        for (_, axes), indices in groups.items():
            flat = [tuple(array.reshape(-1) for array in leaves[index]) for index in indices]
            for chunks, positions in chunks_of(flat, self.chunk_size or default_chunk_size()):
                map_chunks = functools.partial(_map_chunks, self, chunks, operands, axes)
                if len(positions) == 1:
                    results = map_chunks()
                else:
                    # XLA frees the temporaries of a conditional after it. Otherwise all sequences would have theirs at
                    # the same time.
                    unmapped = [flat[position][0] for position in positions]
                    true = jax.lax.optimization_barrier(True)
                    results = jax.lax.cond(true, map_chunks, lambda unmapped=unmapped: unmapped)
                for position, result in zip(positions, results, strict=True):
                    mapped[indices[position]] = result.reshape(mapped[indices[position]].shape)
        return mapped


def _map_chunks(leaf_map: LeafMap, chunks: Chunks, operands: Any, mesh_axes: MeshAxes) -> list[jax.Array]:
    scales = [scales_of(chunks, CONTEXT, mesh_axes)] if leaf_map.needs_scale else []

    def write_chunk(index: Any, mapped: jax.Array) -> jax.Array:
        chunk = chunks.read(index)
        scale = jax.tree.map(lambda number: number[chunk.leaf], scales)
        result = leaf_map.fn(chunk.history, *scale, *operands).astype(mapped.dtype)
        return jax.lax.dynamic_update_slice_in_dim(mapped, result, chunk.start, axis=0)

    mapped = chunks.zeros()
    if chunks.num_chunks == 1:
        mapped = write_chunk(0, mapped)
    else:
        mapped = jax.lax.fori_loop(0, chunks.num_chunks, write_chunk, mapped)
    ends = itertools.accumulate(chunks.sizes)
    return [mapped[end - size : end] for end, size in zip(ends, chunks.sizes, strict=True)]


def finite_or_last(forecast: jax.Array, history: LeafHistory) -> jax.Array:
    """The forecast in the dtype of the history, or the last snapshot where that dtype has no such value."""
    forecast = forecast.astype(history[-1].dtype)
    return jnp.where(jnp.isfinite(forecast), forecast, history[-1])


def check_chunk_size(chunk_size: Any) -> int | None:
    """Raises a `ValueError` unless it is an int of at least 1, or `None`."""
    if chunk_size is None:
        return None
    meaning = (
        f"how many weights to forecast at a time, or None for {_CHUNK_SIZE_ON_CPU} on CPU and {_CHUNK_SIZE_ELSEWHERE} "
        "elsewhere"
    )
    return check_int("chunk_size", chunk_size, meaning, minimum=1)


def default_chunk_size() -> int:
    """How many weights go through a network at a time, where the user does not say it."""
    return _CHUNK_SIZE_ON_CPU if jax.default_backend() == "cpu" else _CHUNK_SIZE_ELSEWHERE
