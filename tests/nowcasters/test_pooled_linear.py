import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests import reference
from tests.helpers import COLLECTIVES, assert_close, random_history, random_leaves
from wnn_jax._roles import ROLES
from wnn_jax.nowcasters import PooledLinear

SHAPES = ((), (1,), (6,), (3, 4), (1, 5), (2, 3, 4, 5))


@pytest.fixture(scope="module")
def nowcaster() -> PooledLinear:
    template = jax.eval_shape(lambda key: PooledLinear.init(key, width=8, num_hidden=1).params, jax.random.key(0))
    return PooledLinear(random_leaves(template, seed=0))


@functools.partial(jax.jit, static_argnames=("role", "horizon"))
def predict(params: Any, history: Any, role: str = "dense", horizon: int | None = None) -> Any:
    return PooledLinear(params)(history, jax.tree.map(lambda _: role, history[-1]), horizon)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize(("role", "horizon"), [("conv", 1), ("embedding", 40)])
def test_agrees_with_the_reference(nowcaster: PooledLinear, shape: tuple[int, ...], role: str, horizon: int):
    history = random_history(shape)
    exact = [np.asarray(snapshot, np.float64) for snapshot in history]
    expected = reference.pooled_linear(exact, nowcaster.params, ROLES.index(role), horizon)
    assert_close(predict(nowcaster.params, history, role, horizon), expected)
    assert np.abs(expected - exact[-1]).max() > 0.1


def test_a_vector_is_a_row_and_each_of_its_weights_a_column(nowcaster: PooledLinear):
    history = random_history((6,))
    as_matrix = predict(nowcaster.params, [snapshot[None] for snapshot in history])
    assert_close(predict(nowcaster.params, history), as_matrix[0], rtol=1e-6)
    scalar = predict(nowcaster.params, [snapshot[0] for snapshot in history])
    assert_close(scalar, predict(nowcaster.params, [snapshot[:1] for snapshot in history])[0], rtol=1e-6)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_trained_is_what_forecasts(nowcaster: PooledLinear, shape: tuple[int, ...]):
    """Of some weights, with statistics from NumPy, the same as of the whole leaf."""
    history = [np.asarray(snapshot) for snapshot in random_history(shape)]
    chosen = np.random.default_rng(0).integers(history[0].size, size=7)
    statistics = nowcaster.statistics_of(history, chosen)
    assert {type(pool) for pool in statistics} == {np.ndarray}
    weights = tuple(jnp.asarray(snapshot.reshape(-1)[chosen]) for snapshot in history)
    changes = nowcaster.changes(weights, statistics, jnp.array(1))
    assert changes.shape == (7, 40)
    predicted = predict(nowcaster.params, history, horizon=12)
    assert_close(weights[-1] + changes[:, 11], predicted.reshape(-1)[chosen])


def test_a_weight_that_did_not_move_stays_whatever_its_row_does(nowcaster: PooledLinear):
    history = [snapshot.at[1, 2].set(0.1).at[:, 3].set(-2.0) for snapshot in random_history((4, 6))]
    predicted = predict(nowcaster.params, history)
    np.testing.assert_array_equal(predicted[1, 2], history[-1][1, 2])
    np.testing.assert_array_equal(predicted[:, 3], history[-1][:, 3])
    assert np.all(predicted[0, :3] != history[-1][0, :3])


def test_leaves_of_one_shape_are_forecast_together_as_each_alone(nowcaster: PooledLinear):
    shapes = {"a": (3, 4), "b": (6,), "c": (3, 4), "d": (0, 4), "e": (6,), "f": (3, 4)}
    alone = {name: random_history(shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    history = [dict(zip(alone, snapshots, strict=True)) for snapshots in zip(*alone.values(), strict=True)]
    predicted = predict(nowcaster.params, history)
    for name, leaf in alone.items():
        assert_close(predicted[name], predict(nowcaster.params, leaf), rtol=1e-6)


def test_a_value_that_is_not_finite_leaves_its_tensor(nowcaster: PooledLinear):
    history = [{"a": leaf, "b": leaf} for leaf in random_history((3, 4))]
    history[2]["a"] = history[2]["a"].at[0, 0].set(np.nan)
    predicted = predict(nowcaster.params, history)
    np.testing.assert_array_equal(predicted["a"], history[-1]["a"])
    assert np.all(predicted["b"] != history[-1]["b"])


@pytest.mark.parametrize("num_leaves", [1, 4])
def test_working_memory_is_bounded_by_a_leaf(nowcaster: PooledLinear, num_leaves: int):
    """Or by the history of one, if there are several of one shape."""
    leaf = jax.ShapeDtypeStruct((1000, 600), jnp.float32)
    predict_all = jax.jit(lambda history: nowcaster(history, ["dense"] * num_leaves))
    analysis: Any = predict_all.lower([[leaf] * num_leaves] * 5).compile().memory_analysis()
    # Beside it, some numbers of each row and each column.
    copies = 1 if num_leaves == 1 else 6
    assert analysis.temp_size_in_bytes <= 4 * (copies * leaf.size + num_leaves * 1600 * 200)


def test_the_program_does_not_grow_with_leaves_of_one_shape(nowcaster: PooledLinear):
    """The sums of rows and columns are there once."""

    def num_reductions(num_leaves: int) -> int:
        roles = {f"Dense_{index}": {"kernel": "dense"} for index in range(num_leaves)}
        history = [jax.tree.map(lambda _, leaf=leaf: leaf, roles) for leaf in random_history((3, 4))]
        return jax.jit(lambda history: nowcaster(history, roles)).lower(history).as_text().count("stablehlo.reduce(")

    assert num_reductions(2) == num_reductions(6) > 0


def test_a_frozen_weight_of_float64_stays_to_the_last_bit(nowcaster: PooledLinear):
    with jax.enable_x64(True):
        history = [snapshot.astype(jnp.float64).at[0].set(0.1) for snapshot in random_history((6,))]
        predicted = np.asarray(predict(nowcaster.params, history))
    assert predicted.dtype == np.float64
    assert predicted[0] == 0.1


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(
    "specs",
    [
        (PartitionSpec("x", "y"),) * 2,
        pytest.param((PartitionSpec(None, ("x", "y")),) * 2, marks=pytest.mark.slow),
        (PartitionSpec("x"), PartitionSpec(None, "x")),
    ],
    ids=str,
)
def test_devices_exchange_sums_of_rows_and_columns_only(
    nowcaster: PooledLinear, axis_type: AxisType, specs: tuple[PartitionSpec, PartitionSpec]
):
    rows, columns = 24, 40
    # Of leaves of one shape, too.
    history = [{"query": leaf, "out": 2 * leaf} for leaf in random_history((rows, columns))]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in zip(("query", "out"), specs, strict=True)}
    with jax.set_mesh(mesh):
        sharded = jax.device_put(history, [shardings] * 5)
        program = predict.lower(nowcaster.params, sharded).compile()
        predicted, text = program(nowcaster.params, sharded), program.as_text() or ""
        assert all(predicted[name].sharding.is_equivalent_to(sharding, 2) for name, sharding in shardings.items())
    jax.tree.map(assert_close, predicted, predict(nowcaster.params, history))
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    sums = [line.split(" all-reduce(")[0].split(" = ")[1] for line in text.splitlines() if " all-reduce(" in line]
    sizes = [
        int(np.prod([int(number) for number in shape.split(",") if number]))
        for line in sums
        for shape in re.findall(r"\w+\[([\d,]*)\]", line)
    ]
    assert 1 < max(sizes) <= max(rows, columns)
