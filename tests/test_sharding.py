"""Large models' layouts: nothing moves between devices, and everything stays sharded as the parameters are."""

import functools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import (
    COLLECTIVES,
    abstract_run,
    assert_trees_close,
    compile_step,
    history_trees,
    identity,
    num_jumps,
    pull_to_one,
    train,
)

MESH = {"data": 4, "model": 2}
# Of the kernels and biases of two layers, a wide one and a narrow one.
LAYOUTS = {
    "replicated": (PartitionSpec(), PartitionSpec(), PartitionSpec(), PartitionSpec()),
    "fsdp": (PartitionSpec("data"), PartitionSpec("data"), PartitionSpec("data"), PartitionSpec()),
    "tensor": (PartitionSpec(None, "model"), PartitionSpec("model"), PartitionSpec("model"), PartitionSpec()),
    "both": (PartitionSpec("data", "model"), PartitionSpec("model"), PartitionSpec("model", "data"), PartitionSpec()),
}
NUM_STEPS = 6


def make_params() -> Any:
    random = np.random.default_rng(0)
    shapes = {"Dense_0": {"bias": (64,), "kernel": (32, 64)}, "Dense_1": {"bias": (4,), "kernel": (64, 4)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_specs(layout: str) -> Any:
    kernel_0, bias_0, kernel_1, bias_1 = LAYOUTS[layout]
    return {"Dense_0": {"bias": bias_0, "kernel": kernel_0}, "Dense_1": {"bias": bias_1, "kernel": kernel_1}}


def make_mesh(axis_type: AxisType, sizes: Any = None) -> jax.sharding.Mesh:
    sizes = MESH if sizes is None else sizes
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


@functools.cache  # So that tests share what was compiled.
def make_tx(nowcaster: str) -> Any:
    return optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=1))


def shard(tree: Any, mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


@pytest.fixture(scope="module", params=[pytest.param("adaptive-linear", marks=pytest.mark.slow), "slow-drift"])
def nowcaster(request: pytest.FixtureRequest) -> str:
    """What makes a forecast of single weights, with or without numbers of their whole tensor."""
    return request.param


@pytest.fixture(scope="module")
def on_one_device(nowcaster: str) -> Any:
    return train(make_tx(nowcaster), make_params(), NUM_STEPS)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "layout", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("replicated", "tensor")), "fsdp", "both"]
)
def test_layouts(nowcaster: str, on_one_device: Any, layout: str, axis_type: AxisType):
    mesh, specs = make_mesh(axis_type), make_specs(layout)
    with jax.set_mesh(mesh):
        params = shard(make_params(), mesh, specs)
        tx = make_tx(nowcaster)
        state = tx.init(params)
        # The program that is run below.
        compiled = compile_step(tx, pull_to_one, identity).lower(params, state).compile()
        steps = train(tx, params, NUM_STEPS, state=state)

        def assert_sharded(tree: Any) -> None:
            jax.tree.map(assert_leaf_sharded, tree, specs)

        def assert_leaf_sharded(leaf: jax.Array, spec: PartitionSpec) -> None:
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)

        for step in steps:
            for tree in (step.params, step.updates, step.state[0][0].mu, *history_trees(step.state[1].history)):
                assert_sharded(tree)
        for tree in history_trees(state[1].history):
            assert_sharded(tree)
    for step, expected in zip(steps, on_one_device, strict=True):
        assert_trees_close(jax.device_get(step.params), expected.params)
    assert steps[-1].state[1].num_nowcasts == num_jumps(nowcaster, NUM_STEPS)

    text = compiled.as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    # What is added up over devices are numbers per tensor: its statistics, and whether its forecast is finite. Of a
    # slow drift it is its norm, and whether it is finite.
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(sums) > 0 or layout == "replicated"
    for line in sums:
        shapes = line.split(" all-reduce(")[0].split(" = ")[1]
        assert "32,64" not in shapes
        assert "64,4" not in shapes
        if nowcaster == "slow-drift":
            assert set(re.findall(r"\w+\[[\d,]*\]", shapes)) <= {"pred[]", "f32[]"}


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(("layout", "axis_type"), [("both", AxisType.Auto), ("fsdp", AxisType.Explicit)])
def test_no_matrix_of_the_spectral_drift_leaves_its_device(layout: str, axis_type: AxisType):
    """What each device makes of its block is tested in `tests/nowcasters/test_spectral.py`."""
    mesh, specs = make_mesh(axis_type), make_specs(layout)
    with jax.set_mesh(mesh):
        params = shard(make_params(), mesh, specs)
        tx = make_tx("drift")
        state = tx.init(params)
        compiled = compile_step(tx, pull_to_one, identity).lower(params, state).compile()
        last = train(tx, params, NUM_STEPS, state=state)[-1]
        for tree in (last.params, last.updates, *history_trees(last.state[1].history)):
            is_sharded = jax.tree.map(
                lambda leaf, spec: leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), tree, specs
            )
            assert all(jax.tree.leaves(is_sharded))
    assert last.state[1].num_nowcasts == NUM_STEPS - 1
    text = compiled.as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    sums = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    assert {shape for line in sums for shape in re.findall(r"\w+\[[\d,]*\]", line)} == {"pred[]", "f32[]"}


@pytest.mark.slow
def test_restored_onto_another_mesh(tmp_path: Path, nowcaster: str, on_one_device: Any):
    """Saved by 8 devices in the middle of a window or a drift, and gone on with on 2."""
    before, after = make_mesh(AxisType.Auto), make_mesh(AxisType.Auto, {"data": 2})
    params = shard(make_params(), before, make_specs("both"))
    saved = train(make_tx(nowcaster), params, 3)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": saved.params, "state": saved.state})

    tx = make_tx(nowcaster)
    shardings = jax.tree.map(lambda spec: NamedSharding(after, spec), make_specs("fsdp"))
    target = abstract_run(tx, make_params, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    for tree in history_trees(restored["state"][1].history):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == shardings
    steps = train(tx, restored["params"], NUM_STEPS - 3, state=restored["state"])
    assert steps[-1].params["Dense_0"]["kernel"].sharding.is_equivalent_to(shardings["Dense_0"]["kernel"], 2)
    assert_trees_close(jax.device_get(steps[-1].params), on_one_device[-1].params)


def test_boxes_of_linen_give_specs_for_the_whole_state(nowcaster: str):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
            return nn.Dense(8, kernel_init=init)(inputs)

    mesh = make_mesh(AxisType.Auto)
    tx = make_tx(nowcaster)

    def init(key: jax.Array) -> Any:
        params = Network().init(key, jnp.zeros([1, 4]))["params"]
        return params, tx.init(params)

    specs = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
    for tree in history_trees(specs[1][1].history):
        assert tree["Dense_0"]["kernel"] == PartitionSpec("data", "model")
        assert tree["Dense_0"]["bias"] == PartitionSpec()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        params, state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(pull_to_one(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(5):
            params, state = step(params, state)
    assert state[1].num_nowcasts == num_jumps(nowcaster, 5)
    for tree in (params, *history_trees(state[1].history)):
        assert tree["Dense_0"]["kernel"].value.sharding.spec == PartitionSpec("data", "model")
