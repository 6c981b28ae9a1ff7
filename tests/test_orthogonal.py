from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import COLLECTIVES, assert_close, assert_dots_are_precise, assert_trees_close, equations
from wnn_jax import _orthogonal
from wnn_jax._orthogonal import matrix_axes, orthogonalize
from wnn_jax._roles import ROLES

# Slow and near to exact: the steps of Muon (Jordan et al., 2024), and cubic ones.
EXACT = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.5, -0.5, 0.0),) * 3


def make_matrix(*shape: int, seed: int = 0, smallest: float = 0.1) -> np.ndarray:
    """`[..., rows, columns]` with singular values from `smallest` to 1."""
    random = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(random.normal(size=shape), full_matrices=False)
    return left * np.geomspace(1, smallest, left.shape[-1]) @ right


def exact_polar(matrices: Any) -> np.ndarray:
    """The slow reference: of `[..., rows, columns]`."""
    matrices = np.asarray(matrices, np.float64)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    is_there = values > 1e-6 * values[..., :1]
    norm = np.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    return (left * is_there[..., None, :]) @ right * norm / np.sqrt(is_there.sum(axis=-1)[..., None, None])


def orthogonalize_dense(leaves: Any, **options: Any) -> Any:
    roles = jax.tree.map(lambda _: "dense", leaves)
    settings: dict[str, Any] = {"coefficients": EXACT, **options}
    return jax.jit(lambda leaves: orthogonalize(leaves, roles, **settings))(leaves)


@pytest.mark.parametrize("shape", [(48, 64), (48, 200)], ids=["by products", "by gram matrices"])
def test_by_default_singular_values_become_roughly_alike(shape: tuple[int, int]):
    matrix = make_matrix(*shape, smallest=1e-2)
    result = orthogonalize_dense(jnp.asarray(matrix, jnp.float32), coefficients=_orthogonal.COEFFICIENTS)
    found = np.linalg.svd(result, compute_uv=False)
    assert 0.6 < found.min() / found.max() < 1
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(matrix), rtol=1e-5)


SHAPES = [(8, 8), (4, 32), (32, 4), (2, 3), (24, 20), (20, 24)]


def test_matrices_become_their_polar_factors_of_the_same_norm_in_their_order():
    leaves = [jnp.asarray(3 * make_matrix(*shape, seed=seed), jnp.float32) for seed, shape in enumerate(SHAPES * 2)]
    for found, leaf in zip(orthogonalize_dense(leaves), leaves, strict=True):
        assert_close(found, exact_polar(leaf), rtol=5e-3)


@pytest.mark.parametrize("shape", [(60, 64), (16, 64)], ids=["by products", "by gram matrices"])
def test_directions_that_are_missing_stay_away(shape: tuple[int, int]):
    low_rank = make_matrix(shape[0], 5) @ make_matrix(5, shape[1])
    assert_close(orthogonalize_dense(jnp.asarray(low_rank, jnp.float32)), exact_polar(low_rank), rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_scale_of_a_matrix_changes_nothing(scale: float):
    matrix = make_matrix(6, 10)
    found = orthogonalize_dense(jnp.asarray(scale * matrix, jnp.float32)) / scale
    assert_close(found, exact_polar(matrix), rtol=5e-3)


def test_a_matrix_of_zeros_among_others_comes_back_as_it_is():
    leaves = [jnp.zeros((4, 6)), jnp.asarray(make_matrix(4, 6), jnp.float32)]
    zeros, other = orthogonalize_dense(leaves)
    np.testing.assert_array_equal(zeros, 0)
    assert_close(other, exact_polar(leaves[1]), rtol=5e-3)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 5), (5, 1), (3, 0, 2), (5,), ()])
def test_what_is_no_matrix_comes_back_as_it_is(shape: tuple[int, ...]):
    leaf = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
    np.testing.assert_array_equal(orthogonalize_dense(leaf), leaf)


def test_other_roles_come_back_as_they_are():
    leaf = jnp.asarray(make_matrix(4, 6), jnp.float32)
    roles = {role: role for role in ROLES}
    found = jax.jit(lambda leaves: orthogonalize(leaves, roles))(dict.fromkeys(roles, leaf))
    changed = {role for role in roles if not np.array_equal(found[role], leaf)}
    assert changed == {"conv", "dense"}


def test_dtypes_stay():
    matrix = make_matrix(5, 7)
    with jax.enable_x64(True):
        leaves = [jnp.asarray(matrix, dtype) for dtype in (jnp.float64, jnp.float32, jnp.bfloat16)]
        found = orthogonalize_dense(leaves)
        assert [leaf.dtype for leaf in found] == [leaf.dtype for leaf in leaves]
        converged = orthogonalize_dense(leaves[0], coefficients=[(1.5, -0.5, 0.0)] * 20)
    assert_close(converged, exact_polar(matrix), rtol=1e-12)


def test_products_are_precise():
    for shape in SHAPES:
        assert_dots_are_precise(orthogonalize_dense, jnp.ones(shape))


@pytest.mark.parametrize("shape", [(8, 8), (4, 32)])
def test_programs_do_not_grow_with_leaves_or_steps(shape: tuple[int, int]):
    def count_products(num_leaves: int, num_steps: int) -> int:
        step = (1.5, -0.5, 0.0)
        program = jax.make_jaxpr(lambda leaves: orthogonalize_dense(leaves, coefficients=[step] * num_steps))
        products = [
            equation
            for equation in equations(program([jnp.ones(shape), jnp.ones(shape[::-1])] * num_leaves))
            if equation.primitive.name == "dot_general"
        ]
        return len(products)

    assert count_products(1, 2) == count_products(5, 9) > 0


@pytest.mark.parametrize("max_weights", [1, 50, 100])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, max_weights: int):
    leaves = [jnp.asarray(make_matrix(4, 6, seed=seed), jnp.float32) for seed in range(5)]
    whole = orthogonalize_dense(leaves)
    monkeypatch.setattr(_orthogonal, "_MAX_WEIGHTS", max_weights)
    assert_trees_close(orthogonalize_dense(leaves), whole)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_high_matrices_are_cut_into_blocks(shape: tuple[int, int]):
    matrix = make_matrix(*shape)
    wide = matrix if shape[0] < shape[1] else matrix.T
    blocks = np.concatenate([exact_polar(wide[start : start + 4]) for start in (0, 4, 8)])
    found = orthogonalize_dense(jnp.asarray(matrix, jnp.float32), max_rows=4)
    assert_close(found, blocks if shape[0] < shape[1] else blocks.T, rtol=5e-3)


def test_vmap():
    members = jnp.asarray(np.stack([make_matrix(4, 6, seed=seed) for seed in range(3)]), jnp.float32)
    assert_close(jax.jit(jax.vmap(orthogonalize_dense))(members), exact_polar(members), rtol=5e-3)


# Which axes are the matrix


@pytest.mark.parametrize(
    ("shape", "bias", "axes"),
    [
        pytest.param((4, 6), (6,), (0, 1), id="dense"),
        pytest.param((4, 6), None, (0, 1), id="without a bias"),
        pytest.param((3, 3, 4, 6), (6,), (0, 3), id="convolution"),
        pytest.param((8, 2, 4), (2, 4), (0, 1), id="query"),
        pytest.param((2, 4, 8), (8,), (0, 2), id="attention's output"),
        pytest.param((5, 4, 6), (5, 6), (1, 2), id="stacked layers"),
        pytest.param((5, 8, 2, 4), (5, 2, 4), (1, 2), id="stacked queries"),
        pytest.param((5, 3, 3, 4, 6), (5, 6), (1, 4), id="stacked convolutions"),
        pytest.param((6, 4, 3, 3), (6, 1, 1), (0, 1), id="convolution of Equinox"),
        pytest.param((6, 4), (6,), (0, 1), id="linear layer of Equinox"),
        pytest.param((3, 4, 6), (7, 9), (0, 2), id="a bias of something else"),
        pytest.param((4, 6), (4, 6), (0, 1), id="a bias of the same shape"),
    ],
)
def test_a_bias_tells_which_axes_are_columns(
    shape: tuple[int, ...], bias: tuple[int, ...] | None, axes: tuple[int, int]
):
    assert matrix_axes("dense", shape, bias) == axes


def test_the_bias_is_that_of_the_same_module():
    query, stacked = make_matrix(8, 6), make_matrix(3, 4, 6)
    params = {
        "query": {"kernel": query.reshape(8, 2, 3), "bias": np.ones((2, 3))},
        "stacked": {"kernel": stacked, "bias": np.ones((3, 6))},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    roles = wnn_jax.default_roles(params)
    found = jax.jit(lambda params: orthogonalize(params, roles, coefficients=EXACT))(params)
    assert_close(found["query"]["kernel"], exact_polar(query).reshape(8, 2, 3), rtol=5e-3)
    assert_close(found["stacked"]["kernel"], exact_polar(stacked), rtol=5e-3)
    np.testing.assert_array_equal(found["stacked"]["bias"], 1)


# Sharded leaves

LAYOUTS = {
    "replicated": PartitionSpec(),
    "fsdp": PartitionSpec("data"),
    "tensor": PartitionSpec(None, "model"),
    "both": PartitionSpec("model", "data"),
}


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_orthogonalises_its_own_block(layout: str, axis_type: AxisType):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type, axis_type))
    leaves = [make_matrix(16, 48), make_matrix(48, 16, seed=1)]
    sharding = NamedSharding(mesh, LAYOUTS[layout])
    rows, columns = (mesh.shape.get(name, 1) for name in (*LAYOUTS[layout], None, None)[:2])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(jnp.asarray(leaf, jnp.float32), sharding) for leaf in leaves]
        compiled = jax.jit(orthogonalize_dense).lower(sharded).compile()
        results = compiled(sharded)
    for leaf, found in zip(leaves, results, strict=True):
        assert found.sharding.is_equivalent_to(sharding, 2)
        blocks = [[exact_polar(block) for block in np.hsplit(part, columns)] for part in np.vsplit(leaf, rows)]
        assert_close(jax.device_get(found), np.block(blocks), rtol=2e-2)
    text = compiled.as_text() or ""
    assert "while" in text
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shards_of_an_attention_kernel(axis_type: AxisType):
    """Over the heads, and over the rows."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type, axis_type))
    kernel = make_matrix(8, 24)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("model", "data"))
        params = {
            "kernel": jax.device_put(jnp.asarray(kernel.reshape(8, 4, 6), jnp.float32), sharding),
            "bias": jnp.ones((4, 6)),
        }
        roles = {"kernel": "dense", "bias": "bias"}
        found = jax.jit(lambda params: orthogonalize(params, roles, coefficients=EXACT))(params)["kernel"]
    blocks = [[exact_polar(block) for block in np.hsplit(part, 4)] for part in np.vsplit(kernel, 2)]
    assert_close(jax.device_get(found), np.block(blocks).reshape(8, 4, 6), rtol=2e-2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_and_unsharded_matrices_of_different_axes(axis_type: AxisType):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    whole, sharded = make_matrix(4, 3, 6), make_matrix(8, 12)
    with jax.set_mesh(mesh):
        over_rows = NamedSharding(mesh, PartitionSpec("x"))
        leaves = [jnp.asarray(whole, jnp.float32), jax.device_put(jnp.asarray(sharded, jnp.float32), over_rows)]
        results = orthogonalize_dense(leaves)
    expected = exact_polar(whole.reshape(12, 6)).reshape(whole.shape)
    assert_close(jax.device_get(results[0]), expected, rtol=5e-3)
    blocks = [exact_polar(block) for block in np.vsplit(sharded, 2)]
    assert_close(jax.device_get(results[1]), np.concatenate(blocks), rtol=5e-3)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older JAX cannot return shards of different sizes")
def test_shards_of_different_sizes_are_one_matrix():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    matrix = make_matrix(12, 5)

    @jax.jit
    def mapped(leaf: Any) -> Any:
        return orthogonalize_dense(jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec("x"))))

    assert_close(mapped(jnp.asarray(matrix, jnp.float32)), exact_polar(matrix), rtol=5e-3)
