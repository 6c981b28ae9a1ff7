"""Histories that take less memory of the device, or less memory."""

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
    Spaced,
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


def average(history: Any, roles: Any, horizon: Any) -> Any:
    """A forecast to which every snapshot counts."""
    del roles, horizon
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *history)


class Average:
    context = 5
    takes_horizon = False
    __call__ = staticmethod(average)


AVERAGE = Average()


def make_tx(nowcaster: Any = AVERAGE, **options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(0.03), wnn_jax.nowcast(nowcaster, snapshot_every=2, **options))


@pytest.mark.parametrize(
    ("nowcaster", "dtype", "copies"),
    [
        ("linear", None, 4.0),
        ("linear", "bfloat16", 2.5),
        ("linear", jnp.float16, 2.5),
        ("linear", "float32", 4.0),
        (Spaced(), None, 2.0),
        (Spaced(), "bfloat16", 1.5),
        ("drift", None, 2.0),
        ("drift", "bfloat16", 1.5),
        (HalfMemory(num_means=3), None, 4.0),
        (HalfMemory(num_means=3), jnp.float16, 2.5),
    ],
)
def test_memory_of_the_history(nowcaster: Any, dtype: Any, copies: float):
    params = network_params()
    state = wnn_jax.nowcast(nowcaster, snapshot_every=1, history_dtype=dtype).init(params)
    assert num_bytes(state.history) == copies * num_bytes(params)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_differences_are_close_to_the_snapshots(dtype: str):
    params = network_params()
    exact, compact = train(make_tx(), params, 12), train(make_tx(history_dtype=dtype), params, 12)
    first, *others = exact[8].state[1].history
    kept_first, *differences = compact[8].state[1].history
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


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_leaves_are_kept_as_they_are(dtype: str):
    params = {"narrow": jnp.ones(3, dtype), "wide": jnp.ones(3)}
    steps = train(make_tx(history_dtype="bfloat16"), params, 10)
    exact = train(make_tx(), params, 10)
    np.testing.assert_array_equal(steps[-1].params["narrow"], exact[-1].params["narrow"])
    assert [snapshot["narrow"].dtype for snapshot in steps[-1].state[1].history] == [jnp.dtype(dtype)] * 4
    assert [snapshot["wide"].dtype for snapshot in steps[-1].state[1].history] == [jnp.float32, *["bfloat16"] * 3]


def test_the_second_window_begins_anew():
    exact, compact = (train(make_tx(history_dtype=dtype), network_params(), 22) for dtype in (None, jnp.bfloat16))
    assert compact[-1].state[1].num_nowcasts == 2
    assert_trees_close(compact[-1].params, exact[-1].params, rtol=1e-2, atol=1e-3)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_drift_goes_by_its_means_as_they_are_kept(dtype: str):
    exact, compact = (train(make_tx(HalfMemory(), history_dtype=kept), network_params(), 8) for kept in (None, dtype))
    for before, step in zip(compact[2::2], compact[3::2], strict=True):
        history = step.state[1].history
        assert {leaf.dtype for leaf in jax.tree.leaves(history.means)} == {jnp.dtype(dtype)}
        assert_trees_equal(history.anchor, step.params)
        by_hand = jax.tree.map(
            lambda mean, param: mean.astype(jnp.float32) - 0.03 * (param - 1), history.means[0], before.params
        )
        assert_trees_close(step.updates, by_hand, rtol=1e-6, atol=1e-7)
    # Half a unit of the last of 8 bits, three times.
    means = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), compact[-1].state[1].history.means)
    assert_trees_close(means, exact[-1].state[1].history.means, rtol=3 * 2**-8, atol=1e-4)


def test_a_window_of_one_snapshot_keeps_nothing():
    tx = wnn_jax.nowcast(last_plus_one(1), snapshot_every=1, history_dtype=jnp.bfloat16)
    assert train(tx, network_params(), 2)[-1].state.num_nowcasts == 2


# In the memory of the host


NOWCASTERS = [AVERAGE, "slow-drift"]


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
def test_the_history_is_kept_on_the_host(nowcaster: Any):
    params = network_params()
    tx = make_tx(nowcaster, history_memory_kind="pinned_host")
    steps, expected = train(tx, params, 12), train(make_tx(nowcaster), params, 12)
    for step, other in zip(steps, expected, strict=True):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(step.state[1].history)}
        assert kinds == {"pinned_host"}
        assert_trees_equal(step.params, other.params)
    assert steps[-1].state[1].num_nowcasts == num_jumps(nowcaster, 6)


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
def test_on_the_host_and_compact(nowcaster: Any):
    on_host, on_device = (
        train(make_tx(nowcaster, history_memory_kind=kind, history_dtype=jnp.bfloat16), network_params(), 10)
        for kind in ("pinned_host", None)
    )
    assert_trees_equal(on_host[-1].params, on_device[-1].params)


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


# Of another transformation


@pytest.mark.slow_but(5)
@pytest.mark.parametrize(
    ("made_by", "used_by", "message"),
    [
        ({}, {"nowcaster": AVERAGE}, r"is a drift of 1 running mean, and Average needs a window of 4 snapshots"),
        ({"nowcaster": AVERAGE}, {}, r"is a window of 4 snapshots, and Drift needs a drift of 1 running mean,"),
        (
            {"nowcaster": last_plus_one(3)},
            {"nowcaster": last_plus_one(5)},
            r"is a window of 2 snapshots, and Leafwise needs a window of 4",
        ),
        (
            {"nowcaster": Spaced((0, 1, 3))},
            {"nowcaster": Spaced((0, 2, 3))},
            r"is a window of 2 snapshots, of the visits \[0, 1\] among 3, and Spaced needs .* visits \[0, 2\] among",
        ),
        (
            {"nowcaster": HalfMemory()},
            {"nowcaster": HalfMemory(num_means=2)},
            r"is a drift of 1 running mean, and HalfMemory needs a drift of 2 running means",
        ),
        # As many trees as a drift has.
        ({"nowcaster": last_plus_one(3)}, {}, r"is a window of 2 snapshots, and Drift needs a drift of 1"),
        ({}, {"history_dtype": "bfloat16"}, r"history.means\[0\].* is of dtype float32, and not bfloat16"),
        (
            {"nowcaster": AVERAGE, "history_dtype": "bfloat16"},
            {"nowcaster": AVERAGE},
            r"history\[1\].* is of dtype bfloat16, and not float32",
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


def test_a_drift_restored_as_plain_tuples_goes_on():
    tx = wnn_jax.nowcast(HalfMemory())
    *_, saved, expected = train(tx, network_params(), 4, gradient=ones_like)
    plain = saved.state._replace(history=tuple(saved.state.history))
    updates, state = jax.jit(tx.update)(ones_like(saved.params), plain, saved.params)
    assert_trees_equal((updates, state), (expected.updates, expected.state))
