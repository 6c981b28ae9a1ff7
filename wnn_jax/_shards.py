"""Functions of many leaves that work on shards: each device has its own, and nothing moves between devices."""

import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, cast

import jax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from wnn_jax._nowcaster import LeafHistory

MeshAxes = tuple[str, ...]


class ShardMap(Hashable, Protocol):
    """What is done to leaves, or to one device's shards of them."""

    def map_shards(
        self, leaves: Sequence[LeafHistory], operands: Any, mesh_axes: Sequence[MeshAxes]
    ) -> list[jax.Array]:
        """Maps leaves as they are on one device.

        Args:
          leaves: for each leaf, arrays of one shape: the leaf, or a shard of it.
          operands: as they were given to `map_where_they_are`.
          mesh_axes: for each leaf, the mesh axes over which it is sharded.

        Returns:
          For each leaf an array of its shape and dtype.
        """
        ...


def map_where_they_are(shard_map: ShardMap, leaves: Sequence[LeafHistory], operands: Any) -> list[jax.Array]:
    """Maps leaves, or on each device the shards that it has, over explicit and over automatic mesh axes alike.

    A leaf whose shards are not all of one size is made whole first.

    Args:
      shard_map: what is done to them. Without arrays of its own: these are the operands.
      leaves: for each leaf, arrays of one shape.
      operands: a tree of unsharded arrays.

    Returns:
      For each leaf an array of its shape, dtype and sharding.
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
        mapped |= zip(indices, _map_explicit(shard_map, mesh, [leaves[i] for i in indices], operands), strict=True)
    if others:
        mapped |= zip(others, _map_automatic(shard_map, [leaves[i] for i in others], operands), strict=True)
    return [mapped[index] for index in range(len(leaves))]


def _map_explicit(shard_map: ShardMap, mesh: AbstractMesh, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
    specs = [cast(PartitionSpec, jax.typeof(leaf[0]).sharding.spec) for leaf in leaves]
    # The check would want to be told that sums over all shards are the same everywhere.
    mapped = jax.shard_map(
        lambda shards, operands: shard_map.map_shards(shards, operands, [_mesh_axes(spec) for spec in specs]),
        mesh=mesh,
        in_specs=([(spec,) * len(leaf) for spec, leaf in zip(specs, leaves, strict=True)], PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, operands)


def _map_automatic(shard_map: ShardMap, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
    # Neither `vmap` nor the partitioner knows what to do with the other's construct.
    mapped = jax.custom_batching.custom_vmap(functools.partial(_map_partitioned, shard_map, len(leaves[0])))

    @mapped.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        batched = jax.vmap(
            lambda leaves, operands: shard_map.map_shards(leaves, operands, [()] * len(leaves)),
            in_axes=tuple(in_axes),
            axis_size=axis_size,
        )(*arguments)
        return batched, jax.tree.map(lambda _: True, batched)

    return mapped(leaves, operands)


def _mesh_axes(spec: PartitionSpec) -> MeshAxes:
    """The mesh axes over which anything with this spec is sharded."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None)
    return tuple(sorted(itertools.chain.from_iterable(entries)))


# Automatic mesh axes: what is sharded how is known to the partitioner only, when the program is compiled.


@functools.partial(custom_partitioning, static_argnums=(0, 1))
def _map_partitioned(shard_map: ShardMap, num_arrays: int, leaves: list[LeafHistory], operands: Any) -> list[jax.Array]:
    del num_arrays
    return shard_map.map_shards(leaves, operands, [()] * len(leaves))


def _partition(shard_map: ShardMap, num_arrays: int, mesh: Any, arguments: Any, results: Any) -> Any:
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
    mesh_axes = [_mesh_axes(sharding.spec) for sharding in shardings]
    return (
        mesh,
        lambda leaves, operands: shard_map.map_shards(leaves, operands, mesh_axes),
        shardings,
        argument_shardings,
    )


def _sharding_rule(shard_map: ShardMap, num_arrays: int, mesh: Any, values: Any, results: Any) -> SdyShardingRule:
    """All arrays of a leaf and its result are sharded alike."""
    del shard_map, mesh
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
