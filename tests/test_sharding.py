"""Layouts of large models: no parameter leaves its device, and the state is sharded like the parameters."""

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
# The specs of the kernels and biases of a wide and a narrow layer.
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


@pytest.fixture(scope="module", params=["slow-drift", "linear", "drift"])
def nowcaster(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def on_one_device(nowcaster: str) -> Any:
    return train(make_tx(nowcaster), make_params(), NUM_STEPS)


@pytest.mark.slow_but(7)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["both", "fsdp", "tensor", "replicated"])
def test_layouts(nowcaster: str, layout: str, axis_type: AxisType):
    mesh, specs = make_mesh(axis_type), make_specs(layout)
    with jax.set_mesh(mesh):
        params = shard(make_params(), mesh, specs)
        tx = make_tx(nowcaster)
        state = tx.init(params)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == jax.tree.map(jax.typeof, state)
        # The program that is run below.
        compiled = compile_step(tx, pull_to_one, identity).lower(params, state).compile()
        steps = train(tx, params, NUM_STEPS, state=state)

    def assert_sharded(leaf: jax.Array, spec: PartitionSpec) -> None:
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)

    trees = [tree for step in steps for tree in (step.params, step.updates, step.state[0][0].mu)]
    histories = [step.state[1].history for step in steps]
    for tree in (*trees, *(tree for history in (state[1].history, *histories) for tree in history_trees(history))):
        jax.tree.map(assert_sharded, tree, specs)
    assert steps[-1].state[1].num_nowcasts == num_jumps(nowcaster, NUM_STEPS)
    # A spectral drift makes a matrix of each device's block: see `tests/test_orthogonal.py`.
    if nowcaster != "drift" or layout == "replicated":
        for step, expected in zip(steps, on_one_device(nowcaster), strict=True):
            assert_trees_close(jax.device_get(step.params), expected.params)

    text = compiled.as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    # Devices add up numbers only: norms, the landmark's, and whether all is finite.
    sums = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    assert sums or layout == "replicated"
    shapes = {shape for line in sums for shape in re.findall(r"\w+\[[\d,]*\]", line.split(" = ")[1])}
    assert shapes <= {"pred[]", "f32[]", "s32[]"}


@pytest.mark.slow
def test_restored_onto_another_mesh(tmp_path: Path):
    """Saved by 8 devices in the middle of a drift, and continued on 2."""
    nowcaster = "slow-drift"
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
    assert_trees_close(jax.device_get(steps[-1].params), on_one_device(nowcaster)[-1].params)


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
