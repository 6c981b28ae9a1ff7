"""Elementwise functions of many leaves, and checks of arguments that several nowcasters have."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_int
from wnn_jax._trees import MeshAxes, map_where_they_are
from wnn_jax._window import LeafHistory, check_length, clip_horizon
from wnn_jax.nowcasters._chunks import Chunks, chunks_of, for_each_chunk
from wnn_jax.nowcasters._scale import scales_of

CONTEXT = 5

_CHUNK_SIZE_ON_CPU = 8192
_CHUNK_SIZE_ELSEWHERE = 2**17


def map_by_role(
    history: Sequence[Any],
    roles: Any,
    predict: Callable[[str, list[LeafHistory]], Sequence[jax.Array]],
    *,
    handled: Collection[str],
    by_name: bool = False,
) -> Any:
    """Forecast a tree of parameters from 5 snapshots, all leaves of one role at once.

    `predict` maps a role and the histories of leaves to forecasts of their shapes. Leaves of roles that are not
    `handled` keep their last value. `by_name` also keeps leaves apart whose names differ in more than numbers.
    """
    check_length(history, CONTEXT)
    leaf_roles, treedef = jax.tree_util.tree_flatten_with_path(roles)
    # By the tree of the roles: parameters may have a node where the roles have a leaf.
    snapshots = [treedef.flatten_up_to(snapshot) for snapshot in history]
    leaves: list[LeafHistory] = [tuple(map(jnp.asarray, leaf)) for leaf in zip(*snapshots, strict=True)]
    forecast = [leaf[-1] for leaf in leaves]
    groups: dict[tuple[str, str], list[int]] = {}
    for index, (path, role) in enumerate(leaf_roles):
        if role in handled:
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

    `fn` maps a tuple of arrays `[n]` and operands to an array `[n]`. It must have no arrays of its own. Its temporaries
    exist for one chunk only, at most `chunk_size` weights. Each device maps its own shards. One loop maps all leaves of
    a dtype, up to 8 million weights, so that XLA compiles the function once or a few times. With `needs_scale`, the
    first operand is the `Scale` of the tensor of each weight, arrays `[n]`.
    """

    fn: Callable[..., jax.Array]
    chunk_size: int | None = None
    needs_scale: bool = False

    def __call__(self, leaves: Sequence[LeafHistory], *operands: Any) -> list[jax.Array]:
        """Map the histories of leaves to arrays of their shapes and dtypes; operands are trees of unsharded arrays."""
        return map_where_they_are(lambda _: self.map_shards, leaves, operands)

    def map_shards(self, leaves: Sequence[LeafHistory], operands: Any, mesh_axes: Sequence[MeshAxes]) -> list[Any]:
        """Map leaves, or one device's shards of them; see `wnn_jax._trees.MapShards`."""
        flat = [tuple(array.reshape(-1) for array in leaf) for leaf in leaves]
        mapped = [leaf[0] for leaf in leaves]
        apart = mesh_axes if self.needs_scale else None
        for chunks, indices in chunks_of(flat, self.chunk_size or default_chunk_size(), apart):
            map_chunks = functools.partial(_map_chunks, self, chunks, operands, apart[indices[0]] if apart else ())
            if len(indices) == 1:
                results = map_chunks()
            else:
                # XLA frees the temporaries of a conditional after it. Otherwise all sequences would have theirs at the
                # same time.
                unmapped = [flat[index][0] for index in indices]
                true = jax.lax.optimization_barrier(True)
                results = jax.lax.cond(true, map_chunks, lambda unmapped=unmapped: unmapped)
            for index, result in zip(indices, results, strict=True):
                mapped[index] = result.reshape(leaves[index][0].shape)
        return mapped


def _map_chunks(leaf_map: LeafMap, chunks: Chunks, operands: Any, mesh_axes: MeshAxes) -> list[jax.Array]:
    scales = [scales_of(chunks, CONTEXT, mesh_axes)] if leaf_map.needs_scale else []

    def write_chunk(index: Any, mapped: jax.Array) -> jax.Array:
        chunk = chunks.read(index)
        scale = jax.tree.map(lambda number: number[chunk.leaf], scales)
        result = leaf_map.fn(chunk.history, *scale, *operands).astype(mapped.dtype)
        return jax.lax.dynamic_update_slice_in_dim(mapped, result, chunk.start, axis=0)

    mapped = for_each_chunk(chunks.num_chunks, write_chunk, chunks.zeros())
    return jnp.split(mapped, np.cumsum(chunks.sizes)[:-1])


def finite_or_last(forecast: jax.Array, history: LeafHistory) -> jax.Array:
    """Return the forecast in the dtype of the history, or the last snapshot where this dtype has no such value."""
    forecast = forecast.astype(history[-1].dtype)
    return jnp.where(jnp.isfinite(forecast), forecast, history[-1])


def check_network(name: str, params: Any, network: str, draw: Callable[[jax.Array], Any]) -> None:
    """Raise a `ValueError` unless parameters have the shapes that `draw` makes of a key.

    `draw` may fail for other parameters. JAX traces the same function only once.
    """
    actual = jax.tree.map(jnp.shape, dict(params) if isinstance(params, Mapping) else params)
    try:
        expected = jax.tree.map(jnp.shape, jax.eval_shape(draw, jax.random.key(0)))
    except (KeyError, TypeError, ValueError, IndexError):
        expected = None
    if expected is None or actual != expected:
        raise ValueError(
            f"{name} are not the parameters of a {network}: they have the shapes {actual} where "
            f"{expected or 'others'} are expected."
        )


def check_chunk_size(chunk_size: Any) -> int | None:
    """Raise a `ValueError` unless it is an int of at least 1, or `None`."""
    if chunk_size is None:
        return None
    default = f"{_CHUNK_SIZE_ON_CPU} on CPU and {_CHUNK_SIZE_ELSEWHERE} elsewhere"
    meaning = f"how many weights to forecast at a time, or None for {default}"
    return check_int("chunk_size", chunk_size, meaning, minimum=1)


def default_chunk_size() -> int:
    """Return how many weights go through a network at a time by default."""
    return _CHUNK_SIZE_ON_CPU if jax.default_backend() == "cpu" else _CHUNK_SIZE_ELSEWHERE


def known_horizon(horizon: Any, default: int, num_horizons: int | None = None) -> jax.Array:
    """Return the horizon to forecast; a traced horizon is clipped to the range, another one must be an int in it."""
    horizon = default if horizon is None else horizon
    if not isinstance(horizon, jax.Array):
        horizon = check_horizon("horizon", horizon, num_horizons)
    return clip_horizon(horizon) if num_horizons is None else clip_horizon(horizon, num_horizons)


def check_horizon(name: str, horizon: Any, num_horizons: int | None) -> int:
    """Raise a `ValueError` unless the nowcaster forecasts this horizon."""
    return check_int(name, horizon, "how many snapshots ahead to forecast", minimum=1, maximum=num_horizons)
