"""A run saved by Orbax in the middle of a window, or of a drift, goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

import wnn_jax
from tests.helpers import abstract_run, bits, history_trees, network_params, num_jumps, train

SNAPSHOT_EVERY = 2
# Three of a window's five snapshots are taken, a drift has made two jumps, and the step is not one with a visit.
SAVED_AFTER = 7
NUM_STEPS = 22


def make_tx(nowcaster: Any) -> Any:
    return optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=SNAPSHOT_EVERY))


def save(folder: Path, tree: Any) -> None:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(SAVED_AFTER, args=ocp.args.StandardSave(tree))


def restore(folder: Path, target: Any) -> Any:
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))


@pytest.mark.parametrize("nowcaster", ["linear", "slow-drift", pytest.param("drift", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("num_devices", "axis_type"),
    [(1, AxisType.Auto), pytest.param(8, AxisType.Auto, marks=pytest.mark.slow), (8, AxisType.Explicit)],
)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, nowcaster: Any, num_devices: int, axis_type: AxisType):
    mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(axis_type,))
    shardings = {"Conv_0": {"kernel": jax.P(None, None, "x"), "bias": jax.P("x")}}
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), shardings)
    params = jax.device_put(network_params(), shardings)

    undisturbed = train(make_tx(nowcaster), params, NUM_STEPS)
    saved = undisturbed[SAVED_AFTER - 1]
    assert (saved.state[1].num_snapshots, saved.state[1].num_nowcasts) == (3, num_jumps(nowcaster, 3))
    is_filled = [bool(tree["Conv_0"]["bias"].any()) for tree in history_trees(saved.state[1].history)]
    assert is_filled == ([True] * 3 + [False] if nowcaster == "linear" else [True] * 2)
    save(tmp_path, {"params": saved.params, "state": saved.state})

    # A new process has the transformation, and the shapes and shardings of the parameters.
    tx = make_tx(nowcaster)
    target = abstract_run(tx, network_params, shardings)
    restored = restore(tmp_path, target)
    assert jax.tree.structure(restored["state"]) == jax.tree.structure(saved.state)
    assert bits(restored) == bits({"params": saved.params, "state": saved.state})

    resumed = train(tx, restored["params"], NUM_STEPS - SAVED_AFTER, state=restored["state"])
    for step, expected in zip(resumed, undisturbed[SAVED_AFTER:], strict=True):
        assert jax.tree.structure(step) == jax.tree.structure(expected)
        assert bits(step) == bits(expected)
    assert resumed[-1].state[1].num_nowcasts == num_jumps(nowcaster, 11)
