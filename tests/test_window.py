"""Windows: `leafwise`, horizons, snapshots of a running mean, and how a history is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import (
    HalfMemory,
    assert_trees_close,
    assert_trees_equal,
    history_trees,
    last_plus_one,
    network_params,
    num_bytes,
    num_jumps,
    ones_like,
    train,
)

# Leafwise nowcasters.


def test_leafwise_passes_each_leaf_with_its_role_and_the_horizon():
    def shift(history: Any, role: str, horizon: Any) -> Any:
        assert len(history) == 3
        return history[0] + horizon if role == "dense" else history[-1] - horizon

    nowcaster = wnn_jax.leafwise(shift, context=3)
    history = [{"a": jnp.full([2, 2], i), "b": jnp.full([2], 10.0 * i)} for i in (1.0, 2.0, 3.0)]
    prediction = nowcaster(history, {"a": "dense", "b": "bias"}, 5)
    np.testing.assert_array_equal(prediction["a"], np.full([2, 2], 6.0))
    np.testing.assert_array_equal(prediction["b"], np.full([2], 25.0))
    assert isinstance(nowcaster, wnn_jax.Nowcaster)
    assert nowcaster.context == 3


def test_leafwise_leaves_other_roles_alone_and_keeps_dtypes():
    nowcaster = wnn_jax.leafwise(lambda history, role, horizon: jnp.float32(9.0), context=1, roles=["bias"])
    history = [{"scale": jnp.ones([], jnp.bfloat16), "bias": jnp.ones([], jnp.bfloat16)}]
    prediction = nowcaster(history, {"scale": "norm", "bias": "bias"}, None)
    assert (prediction["scale"], prediction["bias"]) == (1.0, 9.0)
    assert prediction["bias"].dtype == jnp.bfloat16


def test_histories_may_be_numpy_arrays():
    history = [np.arange(4.0) * step for step in range(5)]
    assert history[0].dtype == np.float64
    nowcaster: Any = wnn_jax.load("linear")
    np.testing.assert_allclose(nowcaster(history, "bias", None), np.arange(4.0) * 9, rtol=1e-5)


def test_bad_arguments_of_leafwise_are_refused():
    def last(history: Any, role: str, horizon: Any) -> Any:
        return history[-1]

    with pytest.raises(ValueError, match="history has 4 snapshots but this nowcaster has context=5"):
        wnn_jax.leafwise(last)([jnp.ones(2)] * 4, "bias", None)
    with pytest.raises(ValueError, match=r"roles=\['attention'\] are unknown; choose from conv, dense"):
        wnn_jax.leafwise(last, roles=["attention", "conv"])


# Horizons.

PUBLISHED = [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]  # Of 10,000 steps, with a jump every 1,000.


def horizons(num_nowcasts: int, **ends: Any) -> list[int]:
    schedule = wnn_jax.decaying_horizon(num_nowcasts, **ends)
    return [int(schedule(index)) for index in range(num_nowcasts)]


def test_the_published_schedule():
    assert horizons(10) == horizons(10, first=np.int64(40), last=np.int32(1)) == PUBLISHED
    assert horizons(1) == [40]
    traced = jax.jit(jax.vmap(wnn_jax.decaying_horizon(10)))(jnp.arange(-2, 12))
    assert traced.dtype == jnp.int32
    assert traced.tolist() == [40, 40, *PUBLISHED, 1, 1]


@pytest.mark.parametrize(("first", "last"), [(40, 1), (40, 7), (1, 40), (5, 5)])
@pytest.mark.parametrize("num_nowcasts", [2, 7, 100])
def test_square_roots_are_a_line_between_the_ends(num_nowcasts: int, first: int, last: int):
    found = horizons(num_nowcasts, first=first, last=last)
    assert (found[0], found[-1]) == (first, last)
    assert found == sorted(found, reverse=first > last)
    line = np.linspace(first**0.5, last**0.5, num_nowcasts)
    np.testing.assert_allclose(found, line**2, rtol=0, atol=0.5 + 1e-9)


# Snapshots of a running mean.

EVERY, DECAY = 3, 0.9
# A power of two, so that no product is rounded, whatever the compiler fuses.
RATE = 2.0**-4
START = {"w": jnp.array([3.0, -2.0]), "b": jnp.array([0.5])}


def averaged_tx(nowcaster: Any = "linear", **options: Any) -> Any:
    settings: dict[str, Any] = {"average": DECAY, **options}
    nowcast = wnn_jax.nowcast(nowcaster, snapshot_every=EVERY, **settings)
    return optax.chain(optax.sgd(RATE), nowcast)


def linear_ahead(window: list[np.ndarray], num_snapshots: int = 5) -> np.ndarray:
    """The least-squares line through the window, evaluated beyond its last snapshot."""
    slope, offset = np.polyfit(np.arange(len(window)), np.stack(window), 1)
    return slope * (len(window) - 1 + num_snapshots) + offset


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_mean_is_forecast_and_both_move_by_as_much(scale: float):
    param = np.array([3.0, -2.0, 0.5])
    mean, window = param.copy(), []
    steps = train(averaged_tx(scale=scale), START, 60)
    for index, step in enumerate(steps):
        param = param - RATE * (param - 1)
        mean = DECAY * mean + (1 - DECAY) * param
        if index % EVERY == EVERY - 1:
            window.append(mean)
            if len(window) == 5:
                jump = scale * (linear_ahead(window) - mean)
                param, mean, window = param + jump, mean + jump, []
        weights = np.concatenate([step.params["w"], step.params["b"]])
        np.testing.assert_allclose(weights, param, rtol=1e-4, atol=1e-5)
    assert steps[-1].state[1].num_nowcasts == 4


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_scale_0_training_is_plain_bit_for_bit(dtype: str):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), START)
    steps = train(averaged_tx(scale=0.0), params, 40)
    plain = train(optax.sgd(RATE), params, 40)
    for step, expected in zip(steps, plain, strict=True):
        jax.tree.map(np.testing.assert_array_equal, step.params, expected.params)
    assert steps[-1].state[1].num_nowcasts == 2


def test_the_mean_begins_with_the_parameters_of_the_first_step():
    tx = averaged_tx()
    steps = train(tx, START, 15, state=tx.init(jax.tree.map(jnp.zeros_like, START)))
    jax.tree.map(np.testing.assert_array_equal, steps[-1].params, train(tx, START, 15)[-1].params)


def test_a_forecast_that_is_not_finite_moves_neither():
    broken = wnn_jax.leafwise(lambda history, role, horizon: history[-1] * jnp.nan)
    steps = train(averaged_tx(broken), START, 5 * EVERY)
    plain = train(averaged_tx(scale=0.0), START, 5 * EVERY)
    jax.tree.map(np.testing.assert_array_equal, steps[-1].params, plain[-1].params)
    jax.tree.map(np.testing.assert_array_equal, steps[-1].state[1].history.mean, plain[-1].state[1].history.mean)
    assert steps[-1].state[1].num_rejected == 1


def test_the_mean_is_one_more_tree_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), START)
    (step,) = train(averaged_tx(), params, 1)
    assert len(jax.tree.leaves(step.state[1].history)) == 5 * len(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(step.state[1].history)} == {"float32"}
    assert step.params["w"].dtype == jnp.bfloat16


def test_seeds_in_parallel_equal_separate_runs():
    seeds = [jax.tree.map(lambda leaf, factor=factor: factor * leaf, START) for factor in (1.0, -2.0)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    together = train(averaged_tx(), batch, 20, transform=jax.vmap)[-1].params
    for index, params in enumerate(seeds):
        alone = train(averaged_tx(), params, 20)[-1].params
        jax.tree.map(
            lambda both, one, index=index: np.testing.assert_allclose(both[index], one, rtol=1e-6), together, alone
        )


# How a history is kept.

# A forecast to which every snapshot counts.
AVERAGE = wnn_jax.leafwise(lambda history, role, horizon: sum(history) / 5)  # pyright: ignore[reportArgumentType]


def make_tx(nowcaster: Any = AVERAGE, **options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(0.03), wnn_jax.nowcast(nowcaster, snapshot_every=2, **options))


@pytest.mark.parametrize(
    ("nowcaster", "dtype", "copies"),
    [
        ("linear", None, 4.0),
        ("linear", "bfloat16", 2.5),
        ("linear", jnp.float16, 2.5),
        ("linear", "float32", 4.0),
        ("drift", None, 2.0),
        ("drift", "bfloat16", 1.5),
    ],
)
def test_memory_of_the_history(nowcaster: Any, dtype: Any, copies: float):
    params = network_params()
    state = wnn_jax.nowcast(nowcaster, snapshot_every=1, history_dtype=dtype).init(params)
    assert num_bytes(state.history) == copies * num_bytes(params)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_history_of_8_bits():
    params = {"w": jnp.zeros(3)}
    exact, compact = (
        train(wnn_jax.nowcast("linear", snapshot_every=1, history_dtype=dtype), params, 5, gradient=ones_like)
        for dtype in (None, "float8_e4m3fn")
    )
    assert compact[-1].state.num_nowcasts == 1
    assert_trees_equal(compact[-1].params, exact[-1].params)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_differences_are_close_to_the_snapshots(dtype: str):
    params = network_params()
    exact, compact = train(make_tx(), params, 22), train(make_tx(history_dtype=dtype), params, 22)
    first, *others = exact[8].state[1].history.snapshots
    kept_first, *differences = compact[8].state[1].history.snapshots
    assert_trees_equal(kept_first, first)
    for snapshot, difference in zip(others, differences, strict=True):
        assert {leaf.dtype for leaf in jax.tree.leaves(difference)} == {jnp.dtype(dtype)}
        moved = jax.tree.map(jnp.subtract, snapshot, first)
        for leaf, kept in zip(jax.tree.leaves(moved), jax.tree.leaves(difference), strict=True):
            # Half a unit of the last of 8 bits.
            np.testing.assert_allclose(kept.astype(jnp.float32), leaf, rtol=2**-8)
    assert compact[9].state[1].num_nowcasts == 1
    forecast = jax.tree.leaves(compact[9].params)
    moved = jax.tree.leaves(jax.tree.map(jnp.subtract, exact[9].params, first))
    for leaf, expected, distance in zip(forecast, jax.tree.leaves(exact[9].params), moved, strict=True):
        assert jnp.all(jnp.abs(leaf - expected) <= 2**-8 * jnp.abs(distance).max())
        assert jnp.any(leaf != expected)
    # The second window begins again.
    assert compact[-1].state[1].num_nowcasts == 2
    assert_trees_close(compact[-1].params, exact[-1].params, rtol=1e-2, atol=1e-3)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_leaves_are_kept_as_they_are(dtype: str):
    params = {"narrow": jnp.ones(3, dtype), "wide": jnp.ones(3)}
    steps = train(make_tx(history_dtype="bfloat16"), params, 10)
    exact = train(make_tx(), params, 10)
    np.testing.assert_array_equal(steps[-1].params["narrow"], exact[-1].params["narrow"])
    snapshots = steps[-1].state[1].history.snapshots
    assert [snapshot["narrow"].dtype for snapshot in snapshots] == [jnp.dtype(dtype)] * 4
    assert [snapshot["wide"].dtype for snapshot in snapshots] == [jnp.float32, *["bfloat16"] * 3]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_drift_goes_by_its_means_as_they_are_kept(dtype: str):
    exact, compact = (train(make_tx(HalfMemory(), history_dtype=kept), network_params(), 8) for kept in (None, dtype))
    for before, step in zip(compact[2::2], compact[3::2], strict=True):
        history = step.state[1].history
        assert {leaf.dtype for leaf in jax.tree.leaves(history.mean)} == {jnp.dtype(dtype)}
        assert_trees_equal(history.anchor, step.params)
        by_hand = jax.tree.map(
            lambda mean, param: mean.astype(jnp.float32) - 0.03 * (param - 1), history.mean, before.params
        )
        assert_trees_close(step.updates, by_hand, rtol=1e-6, atol=1e-7)
    # Half a unit of the last of 8 bits, three times.
    kept = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), compact[-1].state[1].history.mean)
    assert_trees_close(kept, exact[-1].state[1].history.mean, rtol=3 * 2**-8, atol=1e-4)


def test_a_window_of_one_snapshot_keeps_nothing():
    tx = wnn_jax.nowcast(last_plus_one(1), snapshot_every=1, history_dtype=jnp.bfloat16)
    assert train(tx, network_params(), 2)[-1].state.num_nowcasts == 2


NOWCASTERS = [AVERAGE, "slow-drift"]


@pytest.mark.parametrize(("nowcaster", "dtype"), [(AVERAGE, "bfloat16"), ("slow-drift", None)])
def test_the_history_is_kept_on_the_host(nowcaster: Any, dtype: Any):
    on_host, on_device = (
        make_tx(nowcaster, history_memory_kind=kind, history_dtype=dtype) for kind in ("pinned_host", None)
    )
    steps, expected = train(on_host, network_params(), 12), train(on_device, network_params(), 12)
    for step, other in zip(steps, expected, strict=True):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(step.state[1].history)}
        assert kinds == {"pinned_host"}
        assert_trees_equal(step.params, other.params)
    assert steps[-1].state[1].num_nowcasts == num_jumps(nowcaster, 6)


@pytest.mark.slow
@pytest.mark.parametrize("nowcaster", NOWCASTERS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("options", [{"history_dtype": "bfloat16"}, {"history_memory_kind": "pinned_host"}], ids=str)
def test_shards_stay_sharded(nowcaster: Any, axis_type: AxisType, options: Any):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    params = {"kernel": jnp.ones([16, 4]), "bias": jnp.ones(16)}
    expected = train(make_tx(nowcaster, **options), params, 10)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
        steps = train(make_tx(nowcaster, **options), sharded, 10)
        for tree in history_trees(steps[-1].state[1].history):
            assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(tree)} == {"x"}
    assert_trees_close(jax.device_get(steps[-1].params), expected[-1].params)


def test_a_device_without_such_memory_is_named(monkeypatch: pytest.MonkeyPatch):
    class Memory:
        kind = "device"

    class Device:
        def addressable_memories(self) -> list[Memory]:
            return [Memory()]

        def __str__(self) -> str:
            return "TOASTER_0"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match=r"'pinned_host': the device TOASTER_0 has no such memory, only device; pass"):
        make_tx(history_memory_kind="pinned_host").init(network_params())


@pytest.mark.slow_but(5)
@pytest.mark.parametrize(
    ("made_by", "used_by", "message"),
    [
        ({}, {"nowcaster": AVERAGE}, r"is a drift, and Leafwise needs a window of 4 snapshots"),
        ({"nowcaster": AVERAGE}, {}, r"is a window of 4 snapshots, and Drift needs a drift,"),
        (
            {"nowcaster": last_plus_one(3)},
            {"nowcaster": last_plus_one(5)},
            r"is a window of 2 snapshots, and Leafwise needs a window of 4",
        ),
        (
            {"nowcaster": AVERAGE},
            {"nowcaster": AVERAGE, "average": 0.9},
            r"is a window of 4 snapshots, and Leafwise needs a window of 4 snapshots of a running mean",
        ),
        # As many trees as a drift has.
        ({"nowcaster": last_plus_one(3)}, {}, r"is a window of 2 snapshots, and Drift needs a drift"),
        ({}, {"history_dtype": "bfloat16"}, r"history.mean.* is of dtype float32, and not bfloat16"),
        (
            {"nowcaster": AVERAGE, "history_dtype": "bfloat16"},
            {"nowcaster": AVERAGE},
            r"history.snapshots\[1\].* is of dtype bfloat16, and not float32",
        ),
    ],
)
def test_a_history_of_another_kind_is_refused(made_by: Any, used_by: Any, message: str):
    params = network_params()
    tx, other = (wnn_jax.nowcast(snapshot_every=1, **options) for options in (made_by, used_by))
    state = tx.init(params)
    tx.update(params, state, params)
    with pytest.raises(ValueError, match=rf"{message}.* Go on with the nowcaster .* or begin a new one with `init`\."):
        jax.jit(other.update)(params, state, params)
