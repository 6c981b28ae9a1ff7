"""What holds for every network that forecasts the tensors of a model one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import (
    assert_close,
    random_history,
    random_leaves,
)
from wnn_jax.nowcasters import WNN, PooledLinear, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster

ROLES = ("conv", "dense", "bias", "norm", "embedding")
SIZES = {"width": 16, "num_hidden": 2}
SHARDED = (jax.P("x"), 16), (jax.P(None, "x"), 16), (jax.P("x"), 4096)


def random_params(cls: Any, **sizes: int) -> Any:
    if cls is WNN:
        template = jax.eval_shape(lambda key: WNN.init(key, ROLES).params, jax.random.key(0))
    else:
        template = jax.eval_shape(lambda key: cls.init(key, **SIZES | sizes).params, jax.random.key(0))
    return random_leaves(template, seed=0)


def with_slow(*classes: Any) -> list[Any]:
    return [classes[0], *(pytest.param(cls, marks=pytest.mark.slow) for cls in classes[1:])]


@pytest.fixture(scope="module", params=with_slow(WNN, WNNPlus, PooledLinear), ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def params(cls: Any) -> Any:
    return random_params(cls)


@pytest.fixture(scope="module", params=with_slow(WNNPlus, PooledLinear), ids=lambda cls: cls.__name__)
def far(request: pytest.FixtureRequest) -> Any:
    """A nowcaster of many horizons."""
    return request.param(random_params(request.param))


@functools.partial(jax.jit, static_argnames=("cls", "role", "horizon", "chunk_size"))
def predict(
    cls: Any, params: Any, history: Any, role: str = "dense", horizon: int | None = None, chunk_size: int = 4096
) -> jax.Array:
    """A prediction, compiled: most of these tests have many small shapes."""
    chunks: dict[str, Any] = {} if cls is PooledLinear else {"chunk_size": chunk_size}
    return cls(params, **chunks)(history, role, horizon)


@functools.partial(jax.jit, static_argnames="cls")
def predict_at(cls: Any, params: Any, history: Any, horizon: jax.Array) -> jax.Array:
    return cls(params)(history, "dense", horizon)


# What a leaf's shape, size and precision change: nothing


@pytest.mark.slow_but(8)
@pytest.mark.parametrize(
    ("shape", "chunk_size"),
    [((3, 4), 1), ((3, 4), 7), ((3, 4), 12), ((3, 4), 1000), ((), 1), ((), 7), ((0,), 1), ((2, 0, 3), 7)],
)
def test_chunks_change_nothing(cls: Any, params: Any, shape: tuple[int, ...], chunk_size: int):
    history = random_history(shape)
    predicted = predict(cls, params, history, chunk_size=chunk_size)
    assert (predicted.shape, predicted.dtype) == (shape, jnp.float32)
    assert np.isfinite(predicted).all()
    if cls is not PooledLinear:
        flat = [snapshot.reshape(-1) for snapshot in history]
        assert_close(predicted.reshape(-1), predict(cls, params, flat), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_are_forecast_in_float32(cls: Any, params: Any, dtype: Any):
    history = random_history((6,), dtype)
    predicted = predict(cls, params, history)
    assert predicted.dtype == dtype
    in_float32 = predict(cls, params, [snapshot.astype(jnp.float32) for snapshot in history])
    np.testing.assert_array_equal(predicted, in_float32.astype(dtype))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-20, 1e6, -1e30])
def test_a_tensor_that_never_moved_stays(far: Any, value: float):
    leaf = jnp.full([3, 4], value)
    np.testing.assert_array_equal(predict(type(far), far.params, [leaf] * 5), leaf)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100, 124])
def test_weights_of_any_scale_are_forecast(cls: Any, params: Any, exponent: int):
    """Scaled by a power of two, with which nothing is rounded, they move as ever; the smallest are lost."""
    history, scale = random_history((6,)), 2.0**exponent
    predicted = predict(cls, params, [snapshot * scale for snapshot in history])
    assert np.isfinite(predicted).all()
    if cls is PooledLinear:
        assert_close(predicted / scale, predict(cls, params, history), rtol=1e-5)


def test_what_is_beyond_the_dtype_stays(cls: Any, params: Any):
    history = [jnp.array([1.0, -1.0, 0.5, 0.0]) * sign * 3e38 for sign in (1, -1, 1, -1, 1)]
    assert np.isfinite(predict(cls, params, history)).all()
    half = [jnp.array([6e4, -6e4, 100.0], jnp.float16) * sign for sign in (1, -1, 1, -1, 1)]
    assert np.isfinite(predict(cls, params, half).astype(np.float32)).all()


@pytest.mark.slow_but(1)
def test_each_leaf_is_forecast_by_its_role(cls: Any, params: Any):
    leaf = random_history((40,))
    history = [{role: [snapshot] for role in ROLES} for snapshot in leaf]
    predicted = jax.jit(lambda history: cls(params)(history, {role: [role] for role in ROLES}, None))(history)
    for role in ROLES:
        assert_close(predicted[role][0], predict(cls, params, leaf, role), rtol=1e-6)
    assert len({np.asarray(prediction).tobytes() for prediction in jax.tree.leaves(predicted)}) == len(ROLES)


# Transformations


def test_vmap(cls: Any, params: Any):
    members = [random_history((3, 4), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *snapshots: jnp.stack(snapshots), *members)
    horizons = [None] * 3 if cls is WNN else [1, 9, 40]
    traced = None if cls is WNN else jnp.array(horizons)
    batch = jax.vmap(functools.partial(predict_at, cls, params))(stacked, traced)
    for member, history, horizon in zip(batch, members, horizons, strict=True):
        assert_close(member, predict(cls, params, history, horizon=horizon), rtol=1e-6)


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(("spec", "chunk_size"), SHARDED, ids=str)
def test_sharded_leaves(cls: Any, params: Any, axis_type: AxisType, spec: PartitionSpec, chunk_size: int):
    history = random_history((16, 24))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(history, NamedSharding(mesh, spec))
        predicted = predict(cls, params, sharded, chunk_size=chunk_size)
        assert jax.typeof(predicted) == jax.typeof(sharded[0])
    assert_close(predicted, predict(cls, params, history))


# Horizons


@pytest.mark.parametrize("horizon", [1, 2, 39, 40])
def test_one_horizon_is_one_of_all(far: Any, horizon: int):
    history = tuple(random_history((6,)))
    given = history, far.statistics(history), jnp.array(1)
    every = far.changes(*given)
    assert every.shape == (6, 40)
    change = far.changes(*given, horizon)
    assert_close(change, every[:, horizon - 1])
    assert_close(far(history, "dense", horizon), history[-1] + change)


def test_without_a_horizon_it_is_the_default_one(far: Any):
    cls, params, history = type(far), far.params, random_history((6,))
    np.testing.assert_array_equal(predict(cls, params, history), predict(cls, params, history, horizon=5))
    other = cls(params, default_horizon=np.int64(12))
    assert_close(other(history, "dense"), predict(cls, params, history, horizon=12), rtol=1e-6)


@pytest.mark.parametrize(
    ("traced", "static"),
    [(1, 1), (7, 7), (40, 40), (0, 1), (-3, 1), (41, 40), (6.8, 7), (float("nan"), 1), (float("inf"), 40)],
)
def test_a_traced_horizon_equals_a_static_one(far: Any, traced: int, static: int):
    history = random_history((6,))
    predicted = predict_at(type(far), far.params, history, jnp.array(traced))
    assert_close(predicted, predict(type(far), far.params, history, horizon=static), rtol=1e-6)


# What is refused


@pytest.mark.parametrize("horizon", [0, -1, 41, True, 2.0, "3", np.int64(41), np.array(3), (5,)], ids=repr)
def test_a_horizon_out_of_range_is_refused(far: Any, horizon: Any):
    with pytest.raises(ValueError, match=r"horizon=.* must be an int from 1 to 40"):
        far(random_history((4,)), "dense", horizon)
    with pytest.raises(ValueError, match=r"default_horizon=.* must be an int from 1 to 40"):
        type(far)(far.params, default_horizon=horizon)


@pytest.mark.parametrize("horizon", [jnp.array(1j), jnp.array(True), jnp.array([1, 2])], ids=["1j", "True", "[1, 2]"])
def test_a_traced_horizon_that_is_no_number_is_refused(far: Any, horizon: jax.Array):
    with pytest.raises(ValueError, match=r"horizon is of the type .*; an array must be a real scalar"):
        predict_at(type(far), far.params, random_history((4,)), horizon)


def test_params_of_another_network_are_refused(cls: Any, params: Any):
    network = params["dense"] if cls is WNN else params
    *but_last, last = network
    others: list[Any] = [
        jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), network),
        random_params(PooledLinear if cls is WNNPlus else WNNPlus),
        {name: network[name] for name in but_last},
        network | {"more": network[last]},
        network[last],
        {},
        jnp.zeros(3),
    ]
    name = r"params\['dense'\] are not the parameters of a TwoStreamNetwork"
    if issubclass(cls, MultiHorizonNowcaster):
        name = f"params are not the parameters of a {cls.network_class.__name__}"
        others.append(None)
    for other in others:
        with pytest.raises(ValueError, match=name):
            cls(params | {"dense": other} if cls is WNN else other)


# Initialisation


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    "sizes", [{}, {"width": 8}, {"num_hidden": 1}, {"num_hidden": 12}, {"num_horizons": 7}], ids=str
)
def test_the_network_is_read_from_its_parameters(far: Any, sizes: dict[str, int]):
    nowcaster = type(far).init(jax.random.key(0), **SIZES | sizes)
    network = nowcaster.network
    actual = {"width": network.width, "num_hidden": network.num_hidden, "num_horizons": network.num_horizons}
    assert actual == SIZES | {"num_horizons": 40} | sizes
    assert np.isfinite(nowcaster(random_history((4,)), "dense", network.num_horizons)).all()
