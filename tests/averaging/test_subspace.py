import gc
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import COLLECTIVES, assert_dots_are_precise, assert_trees_close, train
from wnn_jax import averaging
from wnn_jax.averaging._make_subspace import _delta
from wnn_jax.averaging._packing import pack, unpack

SHAPES = {"kernel": (8, 6), "bias": (6,), "scale": ()}
FORMS = ("deltas", "orthonormal")
KINDS = pytest.mark.parametrize(("form", "bits"), [*((form, None) for form in FORMS), ("deltas", 4)])


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


def test_training_starts_at_the_uniform_average_or_at_the_last_checkpoint(form: Any):
    checkpoints = path(5)
    subspace = averaging.make_subspace(checkpoints, form=form)
    assert subspace.size == 5
    assert_trees_close(averaging.combine(subspace, averaging.init_coefficients(subspace)), mean_of(checkpoints))
    assert_trees_close(averaging.combine(subspace, averaging.init_coefficients(subspace, "last")), checkpoints[-1])


def test_the_mean_of_narrow_checkpoints_is_wide(form: Any):
    checkpoints = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree) for tree in path(3)]
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in checkpoints]
    subspace = averaging.make_subspace(checkpoints, form=form)
    assert_trees_close(subspace.mean, mean_of(wide))
    assert {leaf.dtype for leaf in jax.tree.leaves(subspace.mean)} == {jnp.dtype(jnp.float32)}


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


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
def test_the_basis_is_orthonormal_and_spans_the_checkpoints(step: float):
    """Also of checkpoints that are nearly collinear."""
    checkpoints = path(6, step)
    subspace = averaging.make_subspace(checkpoints, form="orthonormal")
    basis = np.stack([flat(averaging.combine(subspace, unit)) for unit in jnp.eye(6)])
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=2e-3 if step < 1e-3 else 1e-4)
    for checkpoint in checkpoints:
        weights = flat(checkpoint)
        np.testing.assert_allclose(basis.T @ (basis @ weights), weights, atol=1e-3)


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


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_projected_gradients_take_the_steps_of_the_coefficients(form: Any, momentum: float | None):
    checkpoints, target = path(4), random_tree(99)
    subspace = averaging.make_subspace(checkpoints, form=form)
    sgd, project = optax.sgd(0.05, momentum), averaging.project_onto_subspace(subspace)

    def loss(coefficients: Any) -> Any:
        return optax.tree.norm(optax.tree.sub(averaging.combine(subspace, coefficients), target), squared=True) / 2

    projected = train(
        optax.chain(project, sgd), mean_of(checkpoints), 8, gradient=lambda tree: optax.tree.sub(tree, target)
    )
    trained = train(sgd, averaging.init_coefficients(subspace), 8, gradient=jax.grad(loss))
    for step, other in zip(projected, trained, strict=True):
        assert_trees_close(step.params, averaging.combine(subspace, other.params), rtol=1e-4, atol=1e-4)
    assert loss(trained[-1].params) < loss(averaging.init_coefficients(subspace))


# Few bits


@pytest.mark.slow_but(6)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 6), (7,), (), (3, 0), (1,), (3, 5)])
def test_rounding_is_by_half_a_step_at_most(bits: int, shape: tuple[int, ...]):
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    packed = jax.jit(pack, static_argnames="bits")(array, bits)
    assert packed.codes.dtype == jnp.uint8
    assert packed.codes.shape[-1] == -(-(shape[-1] if shape else 1) * bits // 8)
    error = np.abs(unpack(packed, bits, shape) - array)
    assert error.shape == shape
    assert np.all(error <= packed.step / 2 * 1.001 + 1e-6)
    assert array.size == 0 or packed.step == pytest.approx((array.max() - array.min()) / (2**bits - 1))


@pytest.mark.slow_but(2)
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
        np.sum(unpack(jax.tree.map(lambda leaf, i=i: leaf[i], packed.directions["kernel"]), 4, (8, 6)))
        for i in range(3)
    ]
    np.testing.assert_allclose(gradient["kernel"], unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gradient["bias"], 0)


# Sharded


@pytest.mark.slow_but(1)
@KINDS
def test_shards_stay_where_they_are(form: Any, bits: int | None):
    """In a training step, devices exchange one number for each direction and sharded tensor."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"kernel": PartitionSpec("x"), "wide": PartitionSpec(None, "x"), "bias": PartitionSpec()}
    checkpoints = [tree | {"wide": jnp.tile(tree["kernel"].T, (1, 2))} for tree in path(3)]
    checkpoints = [{name: tree[name] for name in specs} for tree in checkpoints]
    tx = optax.adamw(0.01)

    def loss(x: Any, subspace: Any) -> Any:
        return optax.tree.norm(averaging.combine(subspace, x), squared=True)

    def step(x: Any, opt_state: Any, subspace: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(x, subspace), opt_state, x)
        return optax.apply_updates(x, updates), opt_state

    with jax.set_mesh(mesh):
        sharded = [
            {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}
            for tree in checkpoints
        ]
        subspace = averaging.make_subspace(sharded, form=form, bits=bits)
        for name, directions in subspace.directions.items():
            # All but the first of its arrays are numbers of the quantization.
            first = jax.tree.leaves(directions)[0]
            assert first.sharding.shard_shape(first.shape)[1:] == tuple(
                size // (8 if axis else 1) for size, axis in zip(first.shape[1:], [*specs[name], None], strict=False)
            )
        x = averaging.init_coefficients(subspace)
        combine = jax.jit(averaging.combine).lower(subspace, x).compile()
        assert combine(subspace, x)["kernel"].sharding.spec[0] == "x"
        assert not [name for name in COLLECTIVES if name in (combine.as_text() or "")]
        text = jax.jit(step).lower(x, tx.init(x), subspace).compile().as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    # Once a step: not in a loop.
    assert " all-reduce(" not in text.partition("\nENTRY ")[0]
    reduced = [line.partition(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    assert re.findall(r"\w+\[[\d,]*\]", " ".join(reduced)) == ["f32[3]"] * 2
    expected = averaging.make_subspace(checkpoints, form=form, bits=bits)
    on_one_device = averaging.combine(expected, averaging.init_coefficients(expected, "last"))
    assert_trees_close(
        jax.device_get(averaging.combine(subspace, averaging.init_coefficients(subspace, "last"))), on_one_device
    )


# Checkpoints that are loaded one at a time


class Loaded:
    """Checkpoints that are made whenever they are read; `most` is the most bytes of arrays at such a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.most = 0

    def load(self, seed: int) -> Any:
        random = np.random.default_rng(seed)
        tree = {name: jnp.asarray(random.normal(size=(64, 64)), jnp.float32) for name in ("first", "second")}
        self.most = max(self.most, sum(array.nbytes for array in jax.live_arrays()))
        return tree

    def __iter__(self) -> Iterator[Any]:
        yield from map(self.load, range(self.number))


@pytest.mark.slow_but(1)
@KINDS
def test_no_more_than_two_checkpoints_are_held_beside_the_result(form: Any, bits: int | None):
    checkpoints = Loaded(4)
    of_one = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoints.load(0)))
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    subspace = averaging.make_subspace(checkpoints, form=form, bits=bits)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(subspace))
    assert subspace.size == 4
    assert checkpoints.most - before <= result + 2 * of_one


def test_working_memory_of_few_bits_is_bounded_by_a_tensor():
    tree = [jax.ShapeDtypeStruct((1000, 600), jnp.float32)] * 8
    analysis: Any = _delta.lower(tree, tree, 4).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 4 * 4.1 * 1000 * 600


# What is refused, and what is warned of


class Growing(Loaded):
    def __iter__(self) -> Iterator[Any]:
        self.number += 1
        yield from super().__iter__()


def changed(name: str, change: Any) -> list[Any]:
    """Three checkpoints; the last has another leaf of this name, or none."""
    first, second, third = path(3)
    leaf = change(third.pop(name))
    return [first, second, third if leaf is None else third | {name: leaf}]


def infinite(leaf: Any) -> Any:
    return leaf.at[2].set(jnp.inf)


ORTHONORMAL = {"form": "orthonormal"}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: [], {}, r"checkpoints has 0 of them; give at least 2"),
    (lambda: path(1), {}, r"checkpoints has 1 of them; give at least 2"),
    (lambda: iter(path(3)), {}, r"checkpoints=<list_iterator .* can be iterated over once, and twice is needed"),
    (lambda: Growing(3), {}, r"checkpoints had 4 of them, and another number when iterated over again"),
    (lambda: changed("bias", lambda _: None), {}, r"checkpoints\[2\] has nothing at \['bias'\], where check"),
    (lambda: changed("kernel", jnp.transpose), {}, r"checkpoints\[2\] has float32\(6, 8\) at \['kernel'\]"),
    (lambda: changed("bias", infinite), {}, r"checkpoints\[2\] has a value that is not finite at \['bias'\]"),
    (lambda: path(1) * 3, {}, "checkpoints are all the same"),
    (lambda: path(1) * 3, ORTHONORMAL, "checkpoints are all the same"),
    (lambda: [*path(2), optax.tree.zeros_like(random_tree(0))], ORTHONORMAL, r"\[-1\] is zero, and has no direction"),
    (lambda: path(2), {"form": "other"}, "form='other' must be 'deltas' or 'orthonormal'"),
    (lambda: path(2), {"bits": 4, **ORTHONORMAL}, "bits=4 must be None for form='orthonormal'; only form='deltas'"),
    *((lambda: path(2), {"bits": bits}, "bits=.* must be one of 1, 2, 4, 8: ") for bits in (3, 0, True, 4.0, "4")),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_makes_no_subspace_is_refused(make: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        averaging.make_subspace(make(), **options)


def test_unknown_starts_are_refused():
    with pytest.raises(ValueError, match="start='first' must be 'mean' or 'last'"):
        averaging.init_coefficients(averaging.make_subspace(path(2)), "first")  # pyright: ignore[reportArgumentType]


def test_distances_beyond_the_dtype_are_refused(form: Any):
    far = [jax.tree.map(lambda leaf, sign=sign: sign * 3e38 * jnp.ones_like(leaf), path(1)[0]) for sign in (-1, 1)]
    with pytest.raises(ValueError, match=r"too far from one another or from zero: float32 has room for .* 2\.1e\+37"):
        averaging.make_subspace(far, form=form)


def test_dependent_checkpoints_are_no_directions_of_a_basis():
    first, second, third = path(3)
    checkpoints = [first, optax.tree.scale(0.5, optax.tree.add(first, second)), second, third]
    with pytest.warns(UserWarning, match=r"checkpoints \[\d\] depend linearly on the others"):
        basis = averaging.make_subspace(checkpoints, form="orthonormal")
    # They do no harm to the other form.
    for subspace, size in ((basis, 3), (averaging.make_subspace(checkpoints), 4)):
        assert subspace.size == size
        mean = averaging.combine(subspace, averaging.init_coefficients(subspace))
        assert_trees_close(mean, mean_of(checkpoints))


def test_multiples_of_one_checkpoint_span_a_line():
    (first,) = path(1)
    with pytest.warns(UserWarning, match=r"checkpoints \[0\] depend linearly on the others"):
        subspace = averaging.make_subspace([optax.tree.scale(2, first), first], form="orthonormal")
    assert subspace.size == 1
    mean, last = averaging.init_coefficients(subspace), averaging.init_coefficients(subspace, "last")
    assert_trees_close(averaging.combine(subspace, mean), optax.tree.scale(1.5, first))
    assert_trees_close(averaging.combine(subspace, last), first)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_neither_near_nor_far_checkpoints_are_dependent(form: Any, scale: float):
    """Squares of such numbers are 0 or infinite, and their squared distances differ by 1e12."""
    first, *others = [jax.tree.map(lambda leaf: scale * leaf, tree) for tree in path(4, 1e-3)]
    checkpoints = [jax.tree.map(lambda leaf: 1e3 * leaf[::-1] if leaf.ndim else leaf, first), *others]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace = averaging.make_subspace(checkpoints, form=form)
    combined = averaging.combine(subspace, averaging.init_coefficients(subspace, "last"))
    for actual, expected in zip(jax.tree.leaves(combined), jax.tree.leaves(checkpoints[-1]), strict=True):
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-3)


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
