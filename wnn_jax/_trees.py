"""Trees of arrays: dtypes, differences, norms, choices, and functions that run on each device's shards.

All that XLA needs is in this file: `write_if` and `any_member` make conditionals that copy nothing, `following` saves
memory, and `map_where_they_are` keeps shards on their devices.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

MemoryKind = Literal["pinned_host"] | None
MeshAxes = tuple[str, ...]
# `(leaves, operands, mesh axes that shard each leaf) -> results`; a leaf is a tuple of arrays of one shape.
MapShards = Callable[[Sequence[tuple[jax.Array, ...]], Any, Sequence[MeshAxes]], list[jax.Array]]

# The order of leaves with at most this many weights is left to the compiler, which is then done sooner.
_SMALL = 2**16


def wide_dtype(array: Any) -> Any:
    """Return the dtype in which to compute differences of such arrays: at least float32."""
    return jnp.promote_types(jnp.result_type(array), jnp.float32)


def difference(param: jax.Array, earlier: jax.Array) -> jax.Array:
    """Return `param - earlier`, in at least float32."""
    dtype = wide_dtype(earlier)
    return param.astype(dtype) - earlier.astype(dtype)


def add(update: jax.Array, more: jax.Array) -> jax.Array:
    """Return `update + more` in the dtype of `update`, rounded once."""
    return (update.astype(wide_dtype(update)) + more).astype(update.dtype)


def apply_updates(params: Any, updates: Any) -> Any:
    """Return the parameters after an update, as `optax.apply_updates` does, rounded to their own dtype.

    Without explicit rounding, XLA may keep more digits than bfloat16 has, and see a weight move that stays in place.
    """

    def rounded(array: jax.Array) -> jax.Array:
        limits = jnp.finfo(array.dtype)
        return array if limits.bits >= 32 else jax.lax.reduce_precision(array, limits.nexp, limits.nmant)

    return jax.tree.map(rounded, optax.apply_updates(params, jax.tree.map(rounded, updates)))


def choose(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Return one of two trees, as `jnp.where` with a scalar condition does for arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def all_finite(tree: Any) -> jax.Array:
    """Tell whether a tree has no NaN and no infinity."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))


def norm(array: jax.Array) -> jax.Array:
    """Return the Euclidean norm of an array, in at least float32."""
    return norms(array)[0]


def norms(tree: Any) -> jax.Array:
    """Return the Euclidean norm of each leaf, `[leaves]`, in at least float32. No square overflows."""
    leaves = [leaf.astype(wide_dtype(leaf)) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros([0])
    limits = [jnp.finfo(leaf.dtype) for leaf in leaves]
    # Neither the scale nor its reciprocal, by which a compiler may multiply, is denormal.
    low = np.array([float(limit.smallest_normal) for limit in limits])
    high = np.array([float(limit.max) / 8 for limit in limits])
    largest = jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves])
    scales = jnp.clip(largest, low.astype(largest.dtype), high.astype(largest.dtype))
    squares = [jnp.sum(jnp.square(leaf / scale.astype(leaf.dtype))) for leaf, scale in zip(leaves, scales, strict=True)]
    return scales * jnp.sqrt(jnp.stack(squares))


def following(known: jax.Array, array: Any, leaf: jax.Array) -> jax.Array:
    """Return `array` with a data dependency on `known`, so that XLA computes large leaves one at a time.

    `known` is a number from the leaf before that is never negative. If `leaf` is small, there is no dependency. For the
    jump of a window, this saves two copies of the parameters (CPU, `memory_analysis`).
    """
    if leaf.size <= _SMALL:
        return array
    # This adds zero, which the compiler cannot know.
    return array + jnp.minimum(known, 0).astype(jnp.result_type(array))


def put_away(tree: Any, memory_kind: MemoryKind) -> Any:
    """Return the tree in the host's memory, or unchanged for `None`."""
    return tree if memory_kind is None else jax.device_put(tree, jax.memory.Space.Host)


def fetch(tree: Any, memory_kind: MemoryKind) -> Any:
    """Return the tree that `put_away` returned, back on the device."""
    return tree if memory_kind is None else jax.device_put(tree, jax.memory.Space.Device)


def write_if(predicate: jax.Array, write: Callable[..., Any], keep: Callable[..., Any], *operands: Any) -> Any:
    """Return `write(*operands)` if the predicate holds, else `keep(*operands)`, which copies nothing.

    XLA updates donated operands in place, if the branch taken on True is the branch that writes and returns no more
    than it writes. With the branches the other way round, it copies the whole history on every step (jaxlib 0.10).

    Under `vmap`, `write` runs for all members when the predicate holds for some. It must not change the others.
    """
    return jax.lax.cond(any_member(predicate), write, keep, *operands)


@jax.custom_batching.custom_vmap
def any_member(predicate: jax.Array) -> jax.Array:
    """Return the predicate; under `vmap`, one unbatched scalar that says whether it holds for any member.

    `vmap` would turn a conditional on a batched predicate into a select, which runs both branches at every step.
    """
    return predicate


@any_member.def_vmap
def _any_member_vmap(axis_size: int, in_batched: list[bool], predicate: jax.Array) -> tuple[jax.Array, bool]:  # pyright: ignore[reportUnusedFunction]
    del axis_size
    return any_member(jnp.any(predicate, axis=0) if in_batched[0] else predicate), False


def map_where_they_are(
    make_map: Callable[[Sequence[int]], MapShards], leaves: Sequence[tuple[jax.Array, ...]], operands: Any
) -> list[jax.Array]:
    """Map leaves, each a tuple of arrays of one shape, to one array each of that shape, dtype and sharding.

    Each device maps its own shards, over explicit and automatic mesh axes alike. A leaf whose shards differ in size is
    gathered first. The operands are a tree of unsharded arrays.

    Leaves over different meshes are mapped apart: `make_map` gets the positions of the leaves that are mapped together.
    """
    by_mesh: dict[AbstractMesh | None, list[int]] = {}
    for index, leaf in enumerate(leaves):
        sharding = jax.typeof(leaf[0]).sharding
        is_explicit = any(axis is not None for axis in sharding.spec)
        by_mesh.setdefault(sharding.mesh if is_explicit else None, []).append(index)
    mapped: dict[int, jax.Array] = {}
    for mesh, indices in by_mesh.items():
        map_leaves = _map_automatic if mesh is None else functools.partial(_map_explicit, mesh)
        mapped |= zip(
            indices, map_leaves(make_map(indices), [leaves[index] for index in indices], operands), strict=True
        )
    return [mapped[index] for index in range(len(leaves))]


def _map_explicit(mesh: AbstractMesh, map_shards: MapShards, leaves: list[Any], operands: Any) -> list[jax.Array]:
    specs = [cast(PartitionSpec, jax.typeof(leaf[0]).sharding.spec) for leaf in leaves]
    return jax.shard_map(
        lambda shards, operands: map_shards(shards, operands, list(map(_mesh_axes, specs))),
        mesh=mesh,
        in_specs=([(spec,) * len(leaf) for spec, leaf in zip(specs, leaves, strict=True)], PartitionSpec()),
        out_specs=specs,
        # The check cannot know that sums over all shards are equal on all devices.
        check_vma=False,
    )(leaves, operands)


def _map_automatic(map_shards: MapShards, leaves: list[Any], operands: Any) -> list[jax.Array]:
    # The partitioner's construct has no rule for `vmap`: a batch is mapped without it.
    mapped = jax.custom_batching.custom_vmap(functools.partial(_map_partitioned, map_shards, len(leaves[0])))

    @mapped.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        in_axes = tuple(jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched))
        unsharded = [()] * len(leaves)
        map_batch = jax.vmap(
            lambda leaves, operands: map_shards(leaves, operands, unsharded), in_axes=in_axes, axis_size=axis_size
        )
        return map_batch(*arguments), [True] * len(leaves)

    return mapped(leaves, operands)


def _mesh_axes(spec: PartitionSpec) -> MeshAxes:
    """Return the mesh axes over which an array with this spec is sharded."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None)
    return tuple(sorted(itertools.chain.from_iterable(entries)))


# Over automatic mesh axes only the partitioner knows the shardings, when it compiles the program.
@functools.partial(custom_partitioning, static_argnums=(0, 1))
def _map_partitioned(map_shards: MapShards, num_arrays: int, leaves: list[Any], operands: Any) -> list[jax.Array]:
    del num_arrays
    return map_shards(leaves, operands, [()] * len(leaves))


def _partition(map_shards: MapShards, num_arrays: int, mesh: Any, arguments: Any, results: Any) -> Any:
    del results
    leaves, operands = arguments

    def sharding_of(leaf: tuple[Any, ...]) -> NamedSharding:
        # Uneven shards are padded, and statistics must not count the padding.
        spec = leaf[0].sharding.spec
        num_shards = [math.prod(mesh.shape[axis] for axis in _mesh_axes(PartitionSpec(entry))) for entry in spec]
        is_even = all(size % number == 0 for size, number in zip(leaf[0].shape, num_shards, strict=False))
        return NamedSharding(mesh, spec if is_even else PartitionSpec())

    shardings = [sharding_of(leaf) for leaf in leaves]
    replicated = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), operands)
    mesh_axes = [_mesh_axes(sharding.spec) for sharding in shardings]
    return (
        mesh,
        lambda leaves, operands: map_shards(leaves, operands, mesh_axes),
        shardings,
        ([(sharding,) * num_arrays for sharding in shardings], replicated),
    )


def _sharding_rule(map_shards: MapShards, num_arrays: int, mesh: Any, values: Any, results: Any) -> SdyShardingRule:
    """Say that all arrays of a leaf and its result are sharded alike."""
    del map_shards, mesh

    def mapping(name: str, array: Any) -> ArrayMapping:
        return ArrayMapping(*(f"{name}_{axis}" for axis in range(array.rank)))

    leaves = [mapping(f"leaf{index}", array) for index, array in enumerate(results)]
    arrays = [leaf for leaf in leaves for _ in range(num_arrays)]
    operands = [mapping(f"operand{index}", array) for index, array in enumerate(values[len(arrays) :])]
    return SdyShardingRule((*arrays, *operands), tuple(leaves))


_map_partitioned.def_partition(_partition, sharding_rule=_sharding_rule)
