import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import COLLECTIVES
from wnn_jax.nowcasters._leaves import LeafMap
from wnn_jax.nowcasters._moments import Moments, moments_of_tensor
from wnn_jax.nowcasters._stream import streams_of


def slope(chunk: tuple[jax.Array, ...], statistics: None) -> jax.Array:
    assert statistics is None
    first, last = chunk
    return 3 * last - first


def pair(shape: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    first = jnp.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)
    return first, first**2


SHAPES = [(), (0,), (3, 0), (1,), (5,), (3, 7), (2, 3, 2, 5)]


@pytest.mark.parametrize("chunk_size", [1, 7, 21, 1000, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_change_nothing(shape: tuple[int, ...], chunk_size: int | None):
    arrays = pair(shape)
    (mapped,) = LeafMap(slope, chunk_size)([arrays])
    assert mapped.shape == shape
    np.testing.assert_array_equal(mapped, slope(arrays, None))


@pytest.mark.parametrize("chunk_size", [1, 7, 21, 1000, None])
def test_leaves_come_back_in_their_order(chunk_size: int | None):
    shapes = [*SHAPES, *reversed(SHAPES), (7, 3), (21,)]
    leaves = [pair(shape, dtype) for shape, dtype in zip(shapes, itertools.cycle([jnp.float32, jnp.float16]))]
    leaves = [tuple(array + index for array in leaf) for index, leaf in enumerate(leaves)]
    mapped = LeafMap(slope, chunk_size)(leaves)
    for leaf, found in zip(leaves, mapped, strict=True):
        assert (found.shape, found.dtype) == (leaf[0].shape, leaf[0].dtype)
        np.testing.assert_array_equal(found, slope(leaf, None))


def test_no_leaves():
    assert LeafMap(slope)([]) == []


@pytest.mark.parametrize("size", [4, 5, 8, 9, 11])
def test_no_call_has_more_than_a_chunk(size: int):
    sizes = []

    def record_size(chunk: tuple[jax.Array, ...], statistics: None) -> jax.Array:
        sizes.append(chunk[0].size)
        return slope(chunk, statistics)

    LeafMap(record_size, 4)([pair((size,))])
    assert set(sizes) == {4}


@pytest.mark.parametrize("chunk_size", [2, 100, 1000])
def test_all_leaves_are_mapped_together(chunk_size: int):
    calls: list[int] = []

    def record_call(chunk: tuple[jax.Array, ...], statistics: None) -> jax.Array:
        calls.append(chunk[0].size)
        return slope(chunk, statistics)

    LeafMap(record_call, chunk_size)([pair((2, 3)), pair((6,)), pair((7,))] * 20)
    assert calls == [min(chunk_size, 20 * 19)]


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_result_has_the_dtype_of_the_arrays(chunk_size: int):
    (mapped,) = LeafMap(lambda chunk, _: slope(chunk, None).astype(jnp.float32), chunk_size)([pair((5,), jnp.bfloat16)])
    assert mapped.dtype == jnp.bfloat16


def weighted(chunk: tuple[jax.Array, ...], statistics: None, weights: dict[str, jax.Array], offset: Any) -> jax.Array:
    first, last = chunk
    return weights["first"] * first + (weights["last"] * last[:, None]).sum(axis=1) + offset


OPERANDS = {"first": jnp.array(2.0), "last": jnp.array([[1.0, 0.0, 3.0]])}, 7


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_every_call_is_given_whole_operands(chunk_size: int):
    (mapped,) = LeafMap(weighted, chunk_size)([pair((3, 7))], *OPERANDS)
    first, last = pair((3, 7))
    np.testing.assert_array_equal(mapped, 2 * first + 4 * last + 7)


def test_operands_may_be_traced():
    leaves = [pair((3, 7))]
    mapped = jax.jit(lambda *operands: LeafMap(weighted, 4)(leaves, *operands))(*OPERANDS)
    np.testing.assert_array_equal(mapped, LeafMap(weighted, 4)(leaves, *OPERANDS))


# Statistics of whole tensors


def add_mean(chunk: tuple[jax.Array, ...], mean: jax.Array) -> jax.Array:
    assert mean.shape == chunk[0].shape
    return chunk[0] + mean


def with_means(chunk_size: int | None = None) -> LeafMap:
    return LeafMap(add_mean, chunk_size, summarize=lambda moments: moments.mean)


def expect_means(leaves: Any) -> Any:
    return [leaf[0] + jnp.mean(jnp.stack(leaf)) for leaf in leaves]


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_each_weight_is_told_of_its_own_tensor(chunk_size: int):
    leaves = [tuple(array + 10 * index for array in pair(shape)) for index, shape in enumerate([(3, 4), (6,), (12,)])]
    for found, expected in zip(with_means(chunk_size)(leaves), expect_means(leaves), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# Sharded leaves


def test_vmap():
    leaves = [pair((3, 4)), pair((5,))]
    scales = jnp.array([1.0, 2.0, 3.0])

    def mapped(scale: jax.Array) -> list[jax.Array]:
        scaled = [tuple(scale * array for array in leaf) for leaf in leaves]
        return [a + b for a, b in zip(with_means(5)(scaled), LeafMap(offset, 5)(leaves, scale), strict=True)]

    def offset(chunk: tuple[jax.Array, ...], statistics: None, scale: jax.Array) -> jax.Array:
        return chunk[0] + scale

    batched = jax.jit(jax.vmap(mapped))(scales)
    for index, scale in enumerate(scales):
        for found, expected in zip(batched, mapped(scale), strict=True):
            np.testing.assert_allclose(found[index], expected, rtol=1e-6)


SPECS = [
    PartitionSpec("x"),
    PartitionSpec(None, "y"),
    PartitionSpec("y", "x"),
    PartitionSpec(("x", "y")),
    PartitionSpec(),
]


def sharded_leaves(mesh: Any) -> list[tuple[jax.Array, ...]]:
    leaves = [tuple(array + index for array in pair((8, 16))) for index in range(len(SPECS))]
    return [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, SPECS, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_sharded_leaves(axis_type: AxisType, transform: Any):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(mesh):
        leaves = sharded_leaves(mesh)
        mapped = transform(lambda leaves: LeafMap(weighted, 5)(leaves, *OPERANDS))(leaves)
        means = transform(with_means(5))(leaves)
    leaves = jax.device_get(leaves)
    for found, expected in zip(mapped, LeafMap(weighted, 5)(leaves, *OPERANDS), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(means, expect_means(leaves), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("in_mesh_context", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_shards_stay_where_they_are(axis_type: AxisType, in_mesh_context: bool):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    leaves = sharded_leaves(mesh)

    def compile_map(leaf_map: LeafMap, *operands: Any) -> str:
        compiled = jax.jit(lambda leaves: leaf_map(leaves, *operands)).lower(leaves).compile()
        for leaf, found in zip(leaves, compiled(leaves), strict=True):
            assert found.sharding.is_equivalent_to(leaf[0].sharding, ndim=2)
        return compiled.as_text() or ""

    if in_mesh_context:
        with jax.set_mesh(mesh):
            programs = compile_map(LeafMap(weighted, 5), *OPERANDS), compile_map(with_means(5))
    else:
        programs = compile_map(LeafMap(weighted, 5), *OPERANDS), compile_map(with_means(5))
    elementwise, summed = programs
    assert "while" in elementwise
    assert not [name for name in COLLECTIVES if name in elementwise]
    assert "all-reduce" in summed
    assert not [name for name in COLLECTIVES if name in summed and name != "all-reduce"]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older JAX cannot return shards of different sizes")
def test_shards_of_different_sizes():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    leaf = pair((12, 5))

    @jax.jit
    def mapped(leaf: Any) -> Any:
        return with_means(5)([jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec("x")))])

    np.testing.assert_allclose(mapped(leaf)[0], expect_means([leaf])[0], rtol=1e-6)


# Moments


@pytest.mark.parametrize("size", [1, 2, 100, 2**15, 2**15 + 7, 50_001])
def test_moments_are_those_of_numpy(size: int):
    random = np.random.default_rng(0)
    history = 10 + random.normal(size=(5, 2, size)).astype(np.float32)
    values = history.astype(np.float64)
    mean = values.mean(axis=(0, 2))
    changes = np.diff(values, axis=0)
    unit = np.exp2(np.floor(np.log2(np.abs(values).max(axis=(0, 2)))))
    expected = Moments(
        count=np.full(2, size),
        unit=unit,
        mean=mean,
        squares=((values - mean[:, None]) ** 2).sum(axis=(0, 2)) / unit**2,
        changes=tuple((changes**2).sum(axis=-1) / unit**2),
        lagged=tuple((changes[lag:] * changes[:-lag]).sum(axis=(0, -1)) / unit**2 for lag in (1, 2, 3)),
    )
    leaves = [tuple(map(jnp.asarray, leaf)) for leaf in history.swapaxes(0, 1)]
    together = moments_of_all(leaves)
    alone = [moments_of_tensor(list(leaf)) for leaf in history.swapaxes(0, 1)]
    for moments in (together, jax.tree.map(lambda *x: np.stack(x), *alone)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * size), moments, expected)


@jax.jit
def moments_of_all(leaves: Any) -> Moments:
    ((stream, indices),) = streams_of(leaves, 4096)
    assert sorted(indices) == list(range(len(leaves)))
    return stream.moments(())


@pytest.mark.parametrize("size", [100, 50_000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_tensors_that_do_not_vary_have_no_moments_but_the_mean(value: float, size: int):
    moments = moments_of_all([(jnp.full(size, value),) * 5])
    assert moments.mean == pytest.approx(value)
    assert moments.squares == 0
    assert not np.any(moments.changes)
    assert not np.any(moments.lagged)
