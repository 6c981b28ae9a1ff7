import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import COLLECTIVES, assert_dots_are_precise, assert_trees_close, train
from wnn_jax import averaging
from wnn_jax.averaging._packing import pack, unpack_one

SHAPES = {"kernel": (8, 6), "bias": (6,), "scale": ()}
FORMS = ("deltas", "orthonormal")


def random_tree(seed: int, scale: float = 1.0) -> Any:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * random.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def path(number: int, step: float = 0.1) -> list[Any]:
    """Checkpoints that are close to one another."""
    start = random_tree(0)
    return [jax.tree.map(jnp.add, start, random_tree(seed, step)) for seed in range(1, number + 1)]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def mean_of(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_training_starts_at_the_uniform_average(form: Any):
    checkpoints = path(5)
    subspace = averaging.make_subspace(checkpoints, form=form)
    assert subspace.size == 5
    assert_trees_close(averaging.combine(subspace, averaging.init_coefficients(subspace)), mean_of(checkpoints))


def test_or_at_the_last_checkpoint(form: Any):
    checkpoints = path(5)
    subspace = averaging.make_subspace(checkpoints, form=form)
    assert_trees_close(averaging.combine(subspace, averaging.init_coefficients(subspace, "last")), checkpoints[-1])


def test_deltas_by_hand():
    checkpoints = path(3)
    subspace = averaging.make_subspace(checkpoints)
    coefficients = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(7).normal(size=leaf.shape), jnp.float32),
        averaging.init_coefficients(subspace),
    )
    assert jax.tree.map(jnp.shape, coefficients) == dict.fromkeys(SHAPES, (3,))
    mean = mean_of(checkpoints)
    for name, actual in averaging.combine(subspace, coefficients).items():
        expected = np.asarray(mean[name], np.float64)
        for checkpoint, x in zip(checkpoints, coefficients[name], strict=True):
            delta = np.asarray(checkpoint[name], np.float64) - mean[name]
            expected = expected + float(x) * delta / np.linalg.norm(delta)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_basis_is_orthonormal_and_spans_the_checkpoints():
    checkpoints = path(4)
    subspace = averaging.make_subspace(checkpoints, form="orthonormal")
    basis = np.stack([flat(averaging.combine(subspace, unit)) for unit in jnp.eye(4)])
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-4)
    for checkpoint in checkpoints:
        weights = flat(checkpoint)
        np.testing.assert_allclose(basis.T @ (basis @ weights), weights, atol=1e-4)


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
def test_nearly_collinear_checkpoints(step: float):
    checkpoints = path(6, step)
    subspace = averaging.make_subspace(checkpoints, form="orthonormal")
    basis = np.stack([flat(averaging.combine(subspace, unit)) for unit in jnp.eye(6)])
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=2e-3)


def test_averaging_coefficients_make_the_combination(form: Any):
    checkpoints = path(4)
    subspace = averaging.make_subspace(checkpoints, form=form)
    coefficients = jax.tree.map(lambda leaf: leaf + 0.3, averaging.init_coefficients(subspace))
    shares = averaging.averaging_coefficients(subspace, coefficients)
    combined = averaging.combine(subspace, coefficients)
    mean = mean_of(checkpoints)
    for name in SHAPES:
        of_leaf = shares[name] if form == "deltas" else shares
        rest = 1 - of_leaf.sum() if form == "deltas" else 0.0
        expected = sum(share * tree[name] for share, tree in zip(of_leaf, checkpoints, strict=True))
        np.testing.assert_allclose(combined[name], expected + rest * mean[name], rtol=1e-3, atol=1e-3)


def pull_to(target: Any) -> Any:
    return lambda tree: jax.tree.map(jnp.subtract, tree, target)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_projected_gradients_take_the_steps_of_the_coefficients(form: Any, momentum: float | None):
    checkpoints, target = path(4), random_tree(99)
    subspace = averaging.make_subspace(checkpoints, form=form)
    sgd = optax.sgd(0.05, momentum)
    projected = train(
        optax.chain(averaging.project_onto_subspace(subspace), sgd), mean_of(checkpoints), 8, gradient=pull_to(target)
    )

    def loss(coefficients: Any) -> Any:
        return sum(
            jnp.sum((a - b) ** 2) / 2
            for a, b in zip(
                jax.tree.leaves(averaging.combine(subspace, coefficients)), jax.tree.leaves(target), strict=True
            )
        )

    trained = train(sgd, averaging.init_coefficients(subspace), 8, gradient=jax.grad(loss))
    for step, other in zip(projected, trained, strict=True):
        assert_trees_close(step.params, averaging.combine(subspace, other.params), rtol=1e-4, atol=1e-4)
    assert loss(trained[-1].params) < loss(averaging.init_coefficients(subspace))


def test_the_orthonormal_form_projects():
    subspace = averaging.make_subspace(path(4), form="orthonormal")
    tx = averaging.project_onto_subspace(subspace)
    once, _ = tx.update(random_tree(5), tx.init(random_tree(5)))
    twice, _ = tx.update(once, tx.init(once))
    assert_trees_close(twice, once, rtol=1e-3, atol=1e-4)


def test_any_optimizer_trains_the_coefficients(form: Any):
    subspace = averaging.make_subspace(path(4), form=form)
    target = random_tree(99)
    gradient = jax.grad(lambda x: optax.tree.norm(optax.tree.sub(averaging.combine(subspace, x), target), squared=True))
    steps = train(optax.adamw(0.01), averaging.init_coefficients(subspace), 5, gradient=gradient)
    assert np.isfinite(flat(steps[-1].params)).all()


# Few bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 6), (7,), (1,), (), (3, 5)])
def test_rounding_is_by_half_a_step_at_most(bits: int, shape: tuple[int, ...]):
    arrays = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
    packed = pack(arrays, bits)
    last = shape[-1] if shape else 1
    assert packed.codes.dtype == jnp.uint8
    assert packed.codes.shape[-1] == -(-last * bits // 8)
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], packed)
        error = np.abs(unpack_one(one, bits, shape) - arrays[index])
        step = (arrays[index].max() - arrays[index].min()) / (2**bits - 1)
        assert error.max() <= step / 2 * 1.001 + 1e-6


def test_arrays_without_numbers_are_packed():
    one = jax.tree.map(lambda leaf: leaf[1], pack(jnp.zeros([2, 3, 0]), 4))
    assert unpack_one(one, 4, (3, 0)).shape == (3, 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_low_bits_are_close(bits: int):
    checkpoints = path(5)
    exact, packed = averaging.make_subspace(checkpoints), averaging.make_subspace(checkpoints, bits=bits)
    num_bytes = sum(leaf.codes.nbytes for leaf in packed.directions.values())
    # Rows of 6 numbers, and the scalar.
    assert num_bytes == 5 * ((8 + 1) * -(-6 * bits // 8) + 1)
    assert_trees_close(averaging.combine(packed, averaging.init_coefficients(packed)), mean_of(checkpoints))
    coefficients = jax.tree.map(lambda leaf: leaf + 0.2, averaging.init_coefficients(exact))
    for name, expected in averaging.combine(exact, coefficients).items():
        # A direction has norm 1, and its values are between -1 and 1.
        bound = 5 * 0.2 * 2 / (2**bits - 1) / 2
        np.testing.assert_allclose(averaging.combine(packed, coefficients)[name], expected, atol=bound + 1e-5)


def test_gradients_through_few_bits():
    packed = averaging.make_subspace(path(3), bits=4)
    x = averaging.init_coefficients(packed)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(averaging.combine(packed, x)["kernel"])))(x)
    unit = [
        np.sum(unpack_one(jax.tree.map(lambda leaf, i=i: leaf[i], packed.directions["kernel"]), 4, (8, 6)))
        for i in range(3)
    ]
    np.testing.assert_allclose(gradient["kernel"], unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient["bias"], 0)


# Sharded


@pytest.mark.parametrize("bits", [None, 4])
def test_shards_stay_where_they_are(form: Any, bits: int | None):
    if form == "orthonormal" and bits:
        pytest.skip("few bits are of the other form")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = {"kernel": NamedSharding(mesh, PartitionSpec("x")), "bias": NamedSharding(mesh, PartitionSpec())}
    checkpoints = [{name: tree[name] for name in sharding} for tree in path(3)]
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(tree, sharding) for tree in checkpoints]
        subspace = averaging.make_subspace(sharded, form=form, bits=bits)
        x = averaging.init_coefficients(subspace)
        combine = jax.jit(averaging.combine).lower(subspace, x).compile()
        assert combine(subspace, x)["kernel"].sharding.spec[0] == "x"
        assert not [name for name in COLLECTIVES if name in (combine.as_text() or "")]

        def loss(x: Any, subspace: Any) -> Any:
            return optax.tree.norm(averaging.combine(subspace, x), squared=True)

        text = jax.jit(jax.grad(loss)).lower(x, subspace).compile().as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(sums) >= 1
    assert all("8,6]" not in line.split(" all-reduce(")[0] for line in sums)
    expected = averaging.make_subspace(checkpoints, form=form, bits=bits)
    on_one_device = averaging.combine(expected, averaging.init_coefficients(expected))
    assert_trees_close(jax.device_get(combine(subspace, x)), on_one_device)


# What is refused, and what is warned of


def test_one_checkpoint_is_too_few():
    for checkpoints in ([], path(1)):
        with pytest.raises(ValueError, match=r"checkpoints has \d of them; give at least 2"):
            averaging.make_subspace(checkpoints)


def test_other_structures_are_named():
    first, second, third = path(3)
    with pytest.raises(ValueError, match=r"checkpoints\[2\] has nothing at \['bias'\], where checkpoints\[0\] has f"):
        averaging.make_subspace([first, second, {"kernel": third["kernel"], "scale": third["scale"]}])
    with pytest.raises(ValueError, match=r"checkpoints\[1\] has float32\(6, 8\) at \['kernel'\]"):
        averaging.make_subspace([first, second | {"kernel": second["kernel"].T}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float):
    first, second, third = path(3)
    third["bias"] = third["bias"].at[2].set(value)
    with pytest.raises(ValueError, match=r"checkpoints\[2\] has a value that is not finite at \['bias'\]"):
        averaging.make_subspace([first, second, third])


def test_dependent_checkpoints_are_left_out(form: Any):
    first, second, third = path(3)
    between = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    with pytest.warns(UserWarning, match=r"checkpoints \[\d\] depend linearly on the others"):
        subspace = averaging.make_subspace([first, between, second, third], form=form)
    assert subspace.size == 3
    mean = mean_of([first, between, second, third])
    assert_trees_close(averaging.combine(subspace, averaging.init_coefficients(subspace)), mean)


def test_independent_checkpoints_are_no_reason_to_warn(form: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaging.make_subspace(path(4), form=form)


def test_equal_checkpoints_are_refused(form: Any):
    with pytest.raises(ValueError, match="checkpoints are all the same"):
        averaging.make_subspace(path(1) * 3, form=form)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_near_nor_far_checkpoints_are_dependent(form: Any, scale: float):
    """Squares of such numbers are 0 or infinite, and those of the distances of these differ by 1e12."""
    first, *others = [jax.tree.map(lambda leaf: scale * leaf, tree) for tree in path(4, 1e-3)]
    checkpoints = [jax.tree.map(lambda leaf: 1e3 * leaf[::-1] if leaf.ndim else leaf, first), *others]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace = averaging.make_subspace(checkpoints, form=form)
    combined = averaging.combine(subspace, averaging.init_coefficients(subspace, "last"))
    for actual, expected in zip(jax.tree.leaves(combined), jax.tree.leaves(checkpoints[-1]), strict=True):
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-3)


def test_multiples_of_one_checkpoint_span_a_line():
    first, _ = path(2)
    with pytest.warns(UserWarning, match=r"checkpoints \[0\] depend linearly on the others"):
        subspace = averaging.make_subspace([jax.tree.map(lambda leaf: 2 * leaf, first), first], form="orthonormal")
    assert subspace.size == 1
    starts: list[tuple[Any, float]] = [("mean", 1.5), ("last", 1.0)]
    for start, multiple in starts:
        combined = averaging.combine(subspace, averaging.init_coefficients(subspace, start))
        assert_trees_close(combined, jax.tree.map(lambda leaf, multiple=multiple: multiple * leaf, first))


def test_the_last_checkpoint_needs_a_direction():
    first, second = path(2)
    with pytest.raises(ValueError, match=r"checkpoints\[-1\] is zero, and has no direction; leave it out, or pass"):
        averaging.make_subspace([first, second, jax.tree.map(jnp.zeros_like, first)], form="orthonormal")


def test_distances_beyond_the_dtype_are_refused(form: Any):
    far = [jax.tree.map(lambda leaf, sign=sign: sign * 3e38 * jnp.ones_like(leaf), path(1)[0]) for sign in (-1, 1)]
    with pytest.raises(ValueError, match=r"too far from one another or from zero: float32 has room for .* 2\.1e\+37"):
        averaging.make_subspace(far, form=form)


@pytest.mark.parametrize("bits", [3, 0, True, 4.0, "4"])
def test_other_bits_are_refused(bits: Any):
    with pytest.raises(ValueError, match=r"bits=.* must be one of 1, 2, 4, 8: "):
        averaging.make_subspace(path(2), bits=bits)


def test_few_bits_of_the_other_form_are_refused():
    with pytest.raises(ValueError, match=r"bits=4 must be None for form='orthonormal'; only form='deltas'"):
        averaging.make_subspace(path(2), bits=4, form="orthonormal")


def test_unknown_forms_and_starts_are_refused():
    with pytest.raises(ValueError, match="form='other' must be 'deltas' or 'orthonormal'"):
        averaging.make_subspace(path(2), form="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="start='first' must be 'mean' or 'last'"):
        averaging.init_coefficients(averaging.make_subspace(path(2)), "first")  # pyright: ignore[reportArgumentType]


def test_matrix_products_are_of_the_highest_precision(form: Any):
    """The default of accelerators would round the weights that they make."""
    subspace = averaging.make_subspace(path(4), form=form)
    coefficients = averaging.init_coefficients(subspace)
    updates = path(1)[0]
    tx = averaging.project_onto_subspace(subspace)
    assert_dots_are_precise(averaging.combine, subspace, coefficients)
    assert_dots_are_precise(
        jax.grad(lambda x: optax.tree.norm(averaging.combine(subspace, x), squared=True)), coefficients
    )
    assert_dots_are_precise(lambda updates: tx.update(updates, tx.init(updates)), updates)
    if form == "orthonormal":
        assert_dots_are_precise(averaging.init_coefficients, subspace)
        assert_dots_are_precise(lambda subspace: averaging.init_coefficients(subspace, "last"), subspace)
        assert_dots_are_precise(averaging.averaging_coefficients, subspace, coefficients)
