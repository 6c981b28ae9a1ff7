from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wnn_jax.nowcasters._chunked import map_in_chunks


def slope(chunk: tuple[jax.Array, ...]) -> jax.Array:
    first, last = chunk
    return 3 * last - first


def pair(shape: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    first = jnp.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)
    return first, first**2


SHAPES = [(), (0,), (3, 0), (1,), (5,), (3, 7), (2, 3, 2, 5)]


@pytest.mark.parametrize("chunk_size", [1, 7, 21, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_change_nothing(shape: tuple[int, ...], chunk_size: int):
    arrays = pair(shape)
    mapped = map_in_chunks(slope, arrays, chunk_size)
    assert mapped.shape == shape
    np.testing.assert_array_equal(mapped, slope(arrays))


@pytest.mark.parametrize("size", [4, 5, 8, 9, 11])
def test_no_call_has_more_than_a_chunk(size: int):
    sizes = []

    def record_size(chunk: tuple[jax.Array, ...]) -> jax.Array:
        sizes.append(chunk[0].size)
        return slope(chunk)

    map_in_chunks(record_size, pair((size,)), chunk_size=4)
    assert set(sizes) == {4}


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_result_has_the_dtype_of_the_arrays(chunk_size: int):
    mapped = map_in_chunks(lambda chunk: slope(chunk).astype(jnp.float32), pair((5,), jnp.bfloat16), chunk_size)
    assert mapped.dtype == jnp.bfloat16


def weighted(chunk: tuple[jax.Array, ...], weights: dict[str, jax.Array], offset: Any) -> jax.Array:
    first, last = chunk
    return weights["first"] * first + (weights["last"] * last[:, None]).sum(axis=1) + offset


OPERANDS = {"first": jnp.array(2.0), "last": jnp.array([[1.0, 0.0, 3.0]])}, 7


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_every_call_is_given_whole_operands(chunk_size: int):
    mapped = map_in_chunks(weighted, pair((3, 7)), chunk_size, *OPERANDS)
    first, last = pair((3, 7))
    np.testing.assert_array_equal(mapped, 2 * first + 4 * last + 7)


def test_operands_may_be_traced():
    arrays = pair((3, 7))
    mapped = jax.jit(lambda *operands: map_in_chunks(weighted, arrays, 4, *operands))(*OPERANDS)
    np.testing.assert_array_equal(mapped, map_in_chunks(weighted, arrays, 4, *OPERANDS))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec("x", "y")])
@pytest.mark.parametrize("transform", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_sharded_arrays(axis_type: AxisType, spec: PartitionSpec, transform: Any):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(mesh):
        arrays = jax.device_put(pair((8, 6)), NamedSharding(mesh, spec))
        mapped = transform(lambda *arrays: map_in_chunks(slope, arrays, chunk_size=5))(*arrays)
        with_operands = transform(lambda *operands: map_in_chunks(weighted, arrays, 5, *operands))(*OPERANDS)
    np.testing.assert_array_equal(mapped, slope(pair((8, 6))))
    np.testing.assert_array_equal(with_operands, map_in_chunks(weighted, pair((8, 6)), 5, *OPERANDS))


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x")])
def test_explicit_shards_stay_where_they_are(spec: PartitionSpec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arrays = jax.device_put(pair((8, 16)), NamedSharding(mesh, spec))
        mapped = jax.jit(lambda *arrays: map_in_chunks(weighted, arrays, 5, *OPERANDS)).lower(*arrays).compile()
        assert mapped(*arrays).sharding.is_equivalent_to(arrays[0].sharding, ndim=2)
    program = mapped.as_text() or ""
    assert "while" in program
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in program]
