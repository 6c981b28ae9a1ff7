"""Elementwise functions of many leaves: a bounded number of weights at a time, where the leaves are."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from wnn_jax._checks import check_int
from wnn_jax._nowcaster import LeafHistory
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
) -> Any:
    """Forecasts a tree of parameters, all leaves of one role at once.

    Args:
      history: `context` trees, oldest first.
      roles: a tree like the parameters with a role name at each leaf.
      predict: `(role, histories of leaves) -> forecasts`, of the shapes of the leaves.
      context: how many snapshots there must be.
      handled: the roles to forecast; leaves of others come back as they are in the last snapshot.

    Returns:
      The forecast: the tree, shapes and dtypes of the parameters.

    Raises:
      ValueError: if there are not `context` snapshots.
    """
    if len(history) != context:
        raise ValueError(
            f"history has {len(history)} snapshots but this nowcaster has context={context}; "
            f"pass a sequence of {context} parameter trees, oldest first."
        )
    role_of, treedef = jax.tree.flatten(roles)
    # By the tree of the roles: parameters may have a node where the roles have a leaf.
    snapshots = [treedef.flatten_up_to(snapshot) for snapshot in history]
    leaves: list[LeafHistory] = [tuple(map(jnp.asarray, leaf)) for leaf in zip(*snapshots, strict=True)]
    forecast = [leaf[-1] for leaf in leaves]
    for role in handled:
        chosen = [index for index, this in enumerate(role_of) if this == role]
        predicted = predict(role, [leaves[index] for index in chosen]) if chosen else ()
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
        explicit: dict[Any, list[int]] = {}
        others: list[int] = []
        for index, leaf in enumerate(leaves):
            sharding = jax.typeof(leaf[0]).sharding
            if any(axis is not None for axis in sharding.spec):
                explicit.setdefault(sharding.mesh, []).append(index)
            else:
                others.append(index)
        mapped: dict[int, jax.Array] = {}
        for mesh, indices in explicit.items():
            mapped |= zip(indices, self._map_explicit(mesh, [leaves[i] for i in indices], operands), strict=True)
        if others:
            mapped |= zip(others, self._map_automatic([leaves[i] for i in others], operands), strict=True)
        return [mapped[index] for index in range(len(leaves))]

    def _map_explicit(self, mesh: AbstractMesh, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
        specs = [cast(PartitionSpec, jax.typeof(leaf[0]).sharding.spec) for leaf in leaves]
        # The check would want to be told that sums over all shards are the same everywhere.
        mapped = jax.shard_map(
            lambda shards, operands: _map_local(self, shards, operands, specs),
            mesh=mesh,
            in_specs=([(spec,) * len(leaf) for spec, leaf in zip(specs, leaves, strict=True)], PartitionSpec()),
            out_specs=specs,
            check_vma=False,
        )
        return mapped(leaves, operands)

    def _map_automatic(self, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
        # Neither `vmap` nor the partitioner knows what to do with the other's construct.
        mapped = jax.custom_batching.custom_vmap(functools.partial(_map_partitioned, self, len(leaves[0])))

        @mapped.def_vmap
        def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
            in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
            batched = jax.vmap(
                lambda leaves, operands: _map_local(self, leaves, operands),
                in_axes=tuple(in_axes),
                axis_size=axis_size,
            )(*arguments)
            return batched, jax.tree.map(lambda _: True, batched)

        return mapped(leaves, operands)


def _map_local(
    leaf_map: LeafMap, leaves: Sequence[LeafHistory], operands: Any, specs: Sequence[PartitionSpec] | None = None
) -> list[jax.Array]:
    """Maps leaves, or the local shards of leaves that are sharded by `specs`."""
    mapped = {index: leaf[0] for index, leaf in enumerate(leaves) if leaf[0].size == 0}
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if index not in mapped:
            axes = _mesh_axes(specs[index]) if specs is not None else ()
            alike.setdefault((leaf[0].dtype, axes), []).append(index)
    for (_, axes), indices in alike.items():
        flat = [tuple(array.reshape(-1) for array in leaves[index]) for index in indices]
        for stream, positions in streams_of(flat, leaf_map.chunk_size or _default_chunk_size()):
            map_stream = functools.partial(_map_stream, leaf_map, stream, operands, axes)
            if len(positions) == 1:
                results = map_stream()
            else:
                # What a conditional works with is gone after it; or else all streams would have their memory at once.
                unmapped = [flat[position][0] for position in positions]
                yes = jax.lax.optimization_barrier(True)
                results = jax.lax.cond(yes, map_stream, lambda unmapped=unmapped: unmapped)
            mapped |= zip((indices[position] for position in positions), results, strict=True)
    return [mapped[index].reshape(leaf[0].shape) for index, leaf in enumerate(leaves)]


def _map_stream(leaf_map: LeafMap, stream: Stream, operands: Any, mesh_axes: tuple[str, ...]) -> list[jax.Array]:
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


def check_chunk_size(chunk_size: Any) -> int | None:
    """Raises a `ValueError` unless it is one."""
    if chunk_size is None:
        return None
    meaning = (
        f"how many weights to forecast at a time, or None for {_CHUNK_SIZE_ON_CPU} on CPU and {_CHUNK_SIZE_ELSEWHERE} "
        "elsewhere"
    )
    return check_int("chunk_size", chunk_size, meaning, minimum=1)


def _default_chunk_size() -> int:
    return _CHUNK_SIZE_ON_CPU if jax.default_backend() == "cpu" else _CHUNK_SIZE_ELSEWHERE


def _mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes over which anything with this spec is sharded."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None)
    return tuple(sorted(itertools.chain.from_iterable(entries)))


# Automatic mesh axes: what is sharded how is known to the partitioner only, when the program is compiled.


@functools.partial(custom_partitioning, static_argnums=(0, 1))
def _map_partitioned(leaf_map: LeafMap, num_arrays: int, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
    del num_arrays
    return _map_local(leaf_map, leaves, operands)


def _partition(leaf_map: LeafMap, num_arrays: int, mesh: Any, arguments: Any, results: Any) -> Any:
    del num_arrays, results
    leaves, operands = arguments

    def sharding_of(leaf: LeafHistory) -> NamedSharding:
        # Uneven shards are padded, and statistics must not count the padding.
        spec = cast(NamedSharding, leaf[0].sharding).spec
        num_shards = [math.prod(mesh.shape[axis] for axis in _mesh_axes(PartitionSpec(entry))) for entry in spec]
        is_even = all(size % number == 0 for size, number in zip(leaf[0].shape, num_shards, strict=False))
        return NamedSharding(mesh, spec if is_even else PartitionSpec())

    shardings = [sharding_of(leaf) for leaf in leaves]
    argument_shardings = (
        [(sharding,) * len(leaf) for sharding, leaf in zip(shardings, leaves, strict=True)],
        jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), operands),
    )
    specs = [sharding.spec for sharding in shardings]
    return mesh, lambda leaves, operands: _map_local(leaf_map, leaves, operands, specs), shardings, argument_shardings


def _sharding_rule(leaf_map: LeafMap, num_arrays: int, mesh: Any, values: Any, results: Any) -> SdyShardingRule:
    """All arrays of a leaf and its result are sharded alike."""
    del leaf_map, mesh
    of_results = [
        ArrayMapping(*(f"leaf{index}_{axis}" for axis in range(result.rank))) for index, result in enumerate(results)
    ]
    of_leaves = [mapping for mapping in of_results for _ in range(num_arrays)]
    of_operands = [
        ArrayMapping(*(f"operand{index}_{axis}" for axis in range(value.rank)))
        for index, value in enumerate(values[len(of_leaves) :])
    ]
    return SdyShardingRule((*of_leaves, *of_operands), tuple(of_results))


_map_partitioned.def_partition(_partition, sharding_rule=_sharding_rule)
