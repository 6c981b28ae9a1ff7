"""Histories that take less memory of the device, or less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import assert_trees_close, assert_trees_equal, last_plus_one, network_params, train


def average(history: Any, roles: Any, horizon: Any) -> Any:
    """A forecast to which every snapshot counts."""
    del roles, horizon
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *history)


class Average:
    context = 5
    takes_horizon = False
    __call__ = staticmethod(average)


def make_tx(**options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(0.03), wnn_jax.nowcast(Average(), snapshot_every=2, **options))


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("dtype", "copies"), [(None, 4.0), ("bfloat16", 2.5), (jnp.float16, 2.5), ("float32", 4.0)])
def test_memory_of_the_history(dtype: Any, copies: float):
    params = network_params()
    state = wnn_jax.nowcast(snapshot_every=1, history_dtype=dtype).init(params)
    assert num_bytes(state.history) == copies * num_bytes(params)  # pyright: ignore[reportAttributeAccessIssue]


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


def test_a_window_of_one_snapshot_keeps_nothing():
    tx = wnn_jax.nowcast(last_plus_one(1), snapshot_every=1, history_dtype=jnp.bfloat16)
    assert train(tx, network_params(), 2)[-1].state.num_nowcasts == 2


# In the memory of the host


def test_the_history_is_kept_on_the_host():
    params = network_params()
    tx = make_tx(history_memory_kind="pinned_host")
    steps, expected = train(tx, params, 12), train(make_tx(), params, 12)
    for step, other in zip(steps, expected, strict=True):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(step.state[1].history)}
        assert kinds == {"pinned_host"}
        assert_trees_equal(step.params, other.params)
    assert steps[-1].state[1].num_nowcasts == 1


def test_on_the_host_and_compact():
    tx = make_tx(history_memory_kind="pinned_host", history_dtype=jnp.bfloat16)
    steps = train(tx, network_params(), 10)
    assert_trees_equal(steps[-1].params, train(make_tx(history_dtype=jnp.bfloat16), network_params(), 10)[-1].params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("options", [{"history_dtype": "bfloat16"}, {"history_memory_kind": "pinned_host"}], ids=str)
def test_shards_stay_sharded(axis_type: AxisType, options: Any):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    params = {"kernel": jnp.ones([16, 4]), "bias": jnp.ones(16)}
    expected = train(make_tx(**options), params, 10)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
        steps = train(make_tx(**options), sharded, 10)
        for snapshot in steps[-1].state[1].history:
            assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(snapshot)} == {"x"}
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
