"""Elementwise functions of many leaves: a bounded number of weights at a time, where the leaves are."""

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
from wnn_jax.nowcasters._moments import Moments
from wnn_jax.nowcasters._stream import Stream, streams_of

_CHUNK_SIZE_ON_CPU = 8192
_CHUNK_SIZE_ELSEWHERE = 2**17


def map_by_role(
    history: Sequence[Any],
    roles: Any,
    predict: Callable[[str, list[LeafHistory]], Sequence[jax.Array]],
    *,
    context: int,
    handled: Iterable[str],
    by_name: bool = False,
) -> Any:
    """Forecasts a tree of parameters, all leaves of one role at once.

    Args:
      history: `context` trees, oldest first.
      roles: a tree like the parameters with a role name at each leaf.
      predict: `(role, histories of leaves) -> forecasts`, of the shapes of the leaves.
      context: how many snapshots there must be.
      handled: the roles to forecast; leaves of others come back as they are in the last snapshot.
      by_name: at once are only those of one name, without the numbers in it; these are sharded alike.

    Returns:
      The forecast: the tree, shapes and dtypes of the parameters.

    Raises:
      ValueError: if there are not `context` snapshots.
    """
    check_length(history, context)
    role_of, treedef = jax.tree_util.tree_flatten_with_path(roles)
    # By the tree of the roles: parameters may have a node where the roles have a leaf.
    snapshots = [treedef.flatten_up_to(snapshot) for snapshot in history]
    leaves: list[LeafHistory] = [tuple(map(jnp.asarray, leaf)) for leaf in zip(*snapshots, strict=True)]
    forecast = [leaf[-1] for leaf in leaves]
    known = set(handled)
    alike: dict[tuple[str, str], list[int]] = {}
    for index, (path, role) in enumerate(role_of):
        if role in known:
            name = re.sub(r"\d+", "", jax.tree_util.keystr(path)) if by_name else ""
            alike.setdefault((role, name), []).append(index)
    for (role, _), chosen in alike.items():
        predicted = predict(role, [leaves[index] for index in chosen])
        for index, new in zip(chosen, predicted, strict=True):
            forecast[index] = new.astype(forecast[index].dtype)
    return jax.tree.unflatten(treedef, forecast)


@dataclasses.dataclass(frozen=True)
class LeafMap:
    """An elementwise function, and how to apply it to whole leaves.

    The temporaries of the function exist for one chunk only, whatever the size of the leaves. Sharded leaves stay
    where they are: each device maps its own shards, over explicit and over automatic mesh axes alike. All leaves are
    mapped by one loop, or by few, so that the function is compiled once or a few times.

    Attributes:
      fn: `(tuple of [n] arrays, statistics, *operands) -> [n] array`, for weights of one or of several tensors.
        `statistics` is a tree of `[n]` arrays, what `summarize` made for the tensor of each weight, or `None`.
        Without arrays of its own: these are the operands.
      chunk_size: the largest `n` that `fn` is given, or `None`, for 8192 on CPU and 131,072 elsewhere.
      summarize: makes the statistics of tensors from their `Moments`; or `None`, if `fn` needs none.
    """

    fn: Callable[..., jax.Array]
    chunk_size: int | None = None
    summarize: Callable[[Moments], Any] | None = None

    def __call__(self, leaves: Sequence[LeafHistory], *operands: Any) -> list[jax.Array]:
        """Applies the function.

        Args:
          leaves: for each leaf, arrays of one shape.
          *operands: trees of unsharded arrays that every call of `fn` is given whole.

        Returns:
          For each leaf an array of its shape and dtype.
        """
        return map_where_they_are(self, leaves, operands)

    def map_shards(
        self, leaves: Sequence[LeafHistory], operands: Any, mesh_axes: Sequence[MeshAxes]
    ) -> list[jax.Array]:
        """See `ShardMap.map_shards`."""
        mapped = {index: leaf[0] for index, leaf in enumerate(leaves) if leaf[0].size == 0}
        alike: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            if index not in mapped:
                alike.setdefault((leaf[0].dtype, mesh_axes[index]), []).append(index)
        for (_, axes), indices in alike.items():
            flat = [tuple(array.reshape(-1) for array in leaves[index]) for index in indices]
            for stream, positions in streams_of(flat, self.chunk_size or default_chunk_size()):
                map_stream = functools.partial(_map_stream, self, stream, operands, axes)
                if len(positions) == 1:
                    results = map_stream()
                else:
                    # What a conditional works with is gone after it; or else all streams would have their memory at
                    # once.
                    unmapped = [flat[position][0] for position in positions]
                    yes = jax.lax.optimization_barrier(True)
                    results = jax.lax.cond(yes, map_stream, lambda unmapped=unmapped: unmapped)
                mapped |= zip((indices[position] for position in positions), results, strict=True)
        return [mapped[index].reshape(leaf[0].shape) for index, leaf in enumerate(leaves)]


def _map_stream(leaf_map: LeafMap, stream: Stream, operands: Any, mesh_axes: MeshAxes) -> list[jax.Array]:
    statistics = None if leaf_map.summarize is None else leaf_map.summarize(stream.moments(mesh_axes))

    def write_chunk(index: Any, mapped: jax.Array) -> jax.Array:
        chunk = stream.read(index)
        shape = chunk.history[0].shape
        of_weights = jax.tree.map(lambda value: jnp.broadcast_to(value[chunk.leaf], shape), statistics)
        result = leaf_map.fn(chunk.history, of_weights, *operands).astype(mapped.dtype)
        return jax.lax.dynamic_update_slice_in_dim(mapped, result, chunk.start, axis=0)

    mapped = stream.zeros()
    if stream.num_chunks == 1:
        mapped = write_chunk(0, mapped)
    else:
        mapped = jax.lax.fori_loop(0, stream.num_chunks, write_chunk, mapped)
    ends = itertools.accumulate(stream.sizes)
    return [mapped[end - size : end] for end, size in zip(ends, stream.sizes, strict=True)]


def finite_or_last(forecast: jax.Array, history: LeafHistory) -> jax.Array:
    """A forecast in the dtype of the history; where it has no such value, as beyond the largest, the last one."""
    forecast = forecast.astype(history[-1].dtype)
    return jnp.where(jnp.isfinite(forecast), forecast, history[-1])


def check_chunk_size(chunk_size: Any) -> int | None:
    """Raises a `ValueError` unless it is one."""
    if chunk_size is None:
        return None
    meaning = (
        f"how many weights to forecast at a time, or None for {_CHUNK_SIZE_ON_CPU} on CPU and {_CHUNK_SIZE_ELSEWHERE} "
        "elsewhere"
    )
    return check_int("chunk_size", chunk_size, meaning, minimum=1)


def default_chunk_size() -> int:
    return _CHUNK_SIZE_ON_CPU if jax.default_backend() == "cpu" else _CHUNK_SIZE_ELSEWHERE
