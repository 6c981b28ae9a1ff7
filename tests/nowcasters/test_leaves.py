"""How a function is applied to many leaves: chunk by chunk, with statistics of whole tensors, where the shards are."""

import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import COLLECTIVES
from wnn_jax.nowcasters._chunks import chunks_of
from wnn_jax.nowcasters._leaves import LeafMap
from wnn_jax.nowcasters._scale import Scale, scales_of

SHAPES = [(), (3, 0), (5,), (3, 7), (2, 3, 2)]
Pair = tuple[jax.Array, jax.Array]


def slope(chunk: Pair) -> jax.Array:
    first, last = chunk
    return 3 * last.astype(jnp.float32) - first.astype(jnp.float32)  # Wider than some leaves.


def pair(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Pair:
    """Small integers: half precision has them and their slopes exactly, whatever the compiler fuses."""
    first = jnp.arange(np.prod(shape, dtype=int)).reshape(shape) % 64
    return first.astype(dtype), (first**2 % 50).astype(dtype)


@pytest.mark.parametrize("chunk_size", [1, 21, 50, None])
def test_leaves_come_back_in_their_order(chunk_size: int | None):
    shapes = [*SHAPES, *reversed(SHAPES)]
    leaves = [pair(shape, dtype) for shape, dtype in zip(shapes, itertools.cycle([jnp.float32, jnp.float16]))]
    leaves = [(first + index, last + index) for index, (first, last) in enumerate(leaves)]
    for leaf, mapped in zip(leaves, jax.jit(LeafMap(slope, chunk_size))(leaves), strict=True):
        assert (mapped.shape, mapped.dtype) == (leaf[0].shape, leaf[0].dtype)
        np.testing.assert_array_equal(mapped, slope(leaf))


@pytest.mark.parametrize(("chunk_size", "sizes"), [(4, {4}), (2, {2}), (100, {100}), (1000, {20 * 19})])
def test_one_call_for_all_leaves_has_no_more_than_a_chunk(chunk_size: int, sizes: set[int]):
    calls: list[int] = []

    def record_call(chunk: Pair) -> jax.Array:
        calls.append(chunk[0].size)
        return slope(chunk)

    jax.eval_shape(LeafMap(record_call, chunk_size), [pair((2, 3)), pair((6,)), pair((7,))] * 20)
    assert len(calls) == 1
    assert set(calls) == sizes


def weighted(chunk: Pair, weights: dict[str, jax.Array], offset: Any) -> jax.Array:
    first, last = chunk
    return weights["first"] * first + (weights["last"] * last[:, None]).sum(axis=1) + offset


OPERANDS = {"first": jnp.array(2.0), "last": jnp.array([[1.0, 0.0, 3.0]])}, 7


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_every_call_is_given_whole_operands_that_may_be_traced(chunk_size: int):
    first, last = pair((3, 7))
    (mapped,) = jax.jit(LeafMap(weighted, chunk_size))([(first, last)], *OPERANDS)
    np.testing.assert_array_equal(mapped, 2 * first + 4 * last + 7)


# Statistics of whole tensors. Their leaves have 5 snapshots.


def history(shape: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(np.random.default_rng(seed).normal(10 * seed, 1 + seed, (5, *shape)), jnp.float32))


def standard(chunk: tuple[jax.Array, ...], scale: Scale) -> jax.Array:
    assert scale.mean.shape == scale.std.shape == chunk[0].shape
    return (chunk[0] - scale.mean) / scale.std


def standardized(leaf: Any) -> np.ndarray:
    values = np.asarray(leaf, np.float64)
    return (values[0] - values.mean()) / values.std(ddof=1)


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_each_weight_is_told_of_its_own_tensor(chunk_size: int):
    leaves = [history(shape, seed) for seed, shape in enumerate([(3, 4), (6,), (12,), (2,), (6,)])]
    mapped = LeafMap(standard, chunk_size, needs_scale=True)(leaves)
    for result, leaf in zip(mapped, leaves, strict=True):
        np.testing.assert_allclose(result, standardized(leaf), rtol=1e-5, atol=1e-5)


@jax.jit
def scales(leaves: Any) -> Scale:
    ((chunks, indices),) = chunks_of(leaves, 4096)
    order = np.argsort(indices)
    return jax.tree.map(lambda numbers: numbers[order], scales_of(chunks, 5))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 100, 2), (2**15, 7, 50_001)], ids=str)
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_scales_are_those_of_numpy(sizes: tuple[int, ...], exponent: int):
    """In float32, where the squares of the first and the last would vanish or overflow."""
    leaves = [tuple(2.0**exponent * snapshot for snapshot in history((size,), seed)) for seed, size in enumerate(sizes)]
    actual = scales(leaves)
    values = [np.asarray(leaf, np.float64) for leaf in leaves]
    std = [value.std(ddof=1) for value in values]
    np.testing.assert_allclose(actual.std, std, rtol=1e-5)
    np.testing.assert_array_less(
        np.abs(actual.mean - np.array([value.mean() for value in values])), 1e-4 * np.array(std)
    )


@pytest.mark.parametrize("size", [100, 50_000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_tensors_that_do_not_vary_have_no_deviation(value: float, size: int):
    scale = scales([(jnp.full(size, value),) * 5])
    np.testing.assert_array_equal(scale.mean, np.float32(value))
    np.testing.assert_array_equal(scale.std, 0)


# Transformations and shards


def test_vmap():
    leaves = [history((3, 4)), history((5,))]
    factors = jnp.array([1.0, 2.0, 3.0])

    def mapped(factor: jax.Array) -> list[jax.Array]:
        scaled = [tuple(factor * array for array in leaf) for leaf in leaves]
        return LeafMap(lambda chunk, scale, factor: chunk[0] * factor + scale.mean, 5, needs_scale=True)(scaled, factor)

    batched = jax.jit(jax.vmap(mapped))(factors)
    for index, factor in enumerate(factors):
        for result, expected in zip(batched, mapped(factor), strict=True):
            np.testing.assert_allclose(result[index], expected, rtol=1e-5, atol=1e-5)


SPECS = [
    PartitionSpec("x"),
    PartitionSpec(None, "y"),
    PartitionSpec("y", "x"),
    PartitionSpec(("x", "y")),
    PartitionSpec(),
]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("in_mesh_context", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_shards_stay_where_they_are(axis_type: AxisType, in_mesh_context: bool):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    whole = [history((8, 16), seed) for seed in range(len(SPECS))]
    leaves = [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(whole, SPECS, strict=True)]

    def check(leaf_map: LeafMap, *operands: Any) -> str:
        compiled = jax.jit(lambda leaves: leaf_map(leaves, *operands)).lower(leaves).compile()
        expected = leaf_map(whole, *operands)
        for leaf, result, value in zip(leaves, compiled(leaves), expected, strict=True):
            assert result.sharding.is_equivalent_to(leaf[0].sharding, ndim=2)
            np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
        return compiled.as_text() or ""

    maps = LeafMap(lambda chunk, *operands: weighted(chunk[:2], *operands), 5), LeafMap(standard, 5, needs_scale=True)
    with jax.set_mesh(mesh) if in_mesh_context else contextlib.nullcontext():
        elementwise, summed = check(maps[0], *OPERANDS), check(maps[1])
    assert "while" in elementwise
    assert not [name for name in COLLECTIVES if name in elementwise]
    assert [name for name in COLLECTIVES if name in summed] == ["all-reduce"]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older JAX cannot return shards of different sizes")
def test_shards_of_different_sizes():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    leaf = history((12, 5))

    @jax.jit
    def mapped(leaf: Any) -> Any:
        leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec("x")))
        return LeafMap(standard, 5, needs_scale=True)([leaf])

    np.testing.assert_allclose(mapped(leaf)[0], standardized(leaf), rtol=1e-5, atol=1e-5)


# Large models, and models of many leaves

BLOCK = {"query": (64, 64), "out": (64, 64), "up": (64, 256), "down": (256, 64), "wide": (96, 96)}


def lower(name: str, shapes: dict[str, tuple[int, ...]]) -> jax.stages.Lowered:
    nowcaster: Any = wnn_jax.load(name)
    params = {layer: jax.ShapeDtypeStruct(shape, jnp.float32) for layer, shape in shapes.items()}
    roles = dict.fromkeys(shapes, "dense")
    return jax.jit(lambda history: nowcaster(history, roles, None)).lower((params,) * 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wnn", "wnn-plus"])
def test_working_memory_is_bounded(name: str):
    def temporary_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
        analysis: Any = lower(name, shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    small = temporary_bytes({"Dense_0": (1000, 1000)})
    assert temporary_bytes({"Dense_0": (10_000, 10_000)}) <= small + 2**16
    # Plus the forecast of several leaves as one array, before it is cut.
    many = temporary_bytes({f"Dense_{index}": (1000, 1000) for index in range(100)})
    assert many <= small + 2**25 + 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wnn", "wnn-plus"])
def test_the_network_is_compiled_once_for_all_leaves_of_a_role(name: str):
    def num_instances(num_blocks: int) -> int:
        shapes = {f"{layer}_{block}": shape for block in range(num_blocks) for layer, shape in BLOCK.items()}
        # Every network has them, and nothing else.
        text = lower(name, shapes).as_text()
        return text.count("stablehlo.exponential") + text.count("stablehlo.logistic")

    assert 0 < num_instances(1) == num_instances(12)
