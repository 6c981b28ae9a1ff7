"""`nowcast` inside what JAX and Optax make of functions and transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import (
    WINDOWS,
    HalfMemory,
    Step,
    assert_trees_close,
    assert_trees_equal,
    last_plus_one,
    make_step,
    network_params,
    num_jumps,
    ones_like,
    pull_to_one,
    train,
)

JUMP = 2.0  # of `last_plus_one`, where the ordinary update is 1


def adam_and_nowcast(nowcaster: str | wnn_jax.Nowcaster, **kwargs: Any) -> Any:
    return optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=2, **kwargs))


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def seeds(num_seeds: int) -> list[Any]:
    """The parameters of several runs."""
    return [jax.tree.map(lambda leaf, seed=seed: leaf + seed, network_params()) for seed in range(num_seeds)]


# jit, scan


def test_donated_state_and_parameters(nowcaster: str | wnn_jax.Nowcaster):
    tx = adam_and_nowcast(nowcaster)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        return make_step(tx, pull_to_one)(params, state)[1:]

    donated_step = jax.jit(step, donate_argnums=(0, 1))
    params, state = network_params(), tx.init(network_params())
    for expected in train(tx, params, 23):
        old = jax.tree.leaves((params, state))
        params, state = donated_step(params, state)
        assert all(leaf.is_deleted() for leaf in old)
        assert_trees_close((params, state), expected[1:])
    assert state[1].num_nowcasts == num_jumps(nowcaster, 11)


def test_scan_equals_a_loop(nowcaster: str | wnn_jax.Nowcaster):
    tx = adam_and_nowcast(nowcaster)
    step = make_step(tx, pull_to_one)
    params = network_params()

    def body(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Step]:
        result = step(*carry)
        return (result.params, result.state), result

    _, scanned = jax.jit(lambda carry: jax.lax.scan(body, carry, length=12))((params, tx.init(params)))
    assert_trees_close(scanned, stack(train(tx, params, 12)))
    assert scanned.state[1].num_nowcasts[-1] == num_jumps(nowcaster, 6)


@pytest.mark.parametrize(
    ("nowcaster", "scale", "expected"),
    [
        # Each step halves the distance to one. From the end of the second, the jump goes half the way to that plus one.
        (last_plus_one(context=2), 0.5, (1.5 + 0.5, 0.25)),
        # From 3 to 2 to 1.5, and on by half of the last displacement.
        (HalfMemory(), 1.0, (1.5 - 0.25, 0.125)),
    ],
    ids=["window", "drift"],
)
def test_gradients_flow_through_training(nowcaster: Any, scale: float, expected: tuple[float, float]):
    tx = optax.chain(optax.sgd(0.5), wnn_jax.nowcast(nowcaster, snapshot_every=1, scale=scale))
    step = make_step(tx, pull_to_one)

    def trained(params: jax.Array) -> jax.Array:
        state = tx.init(params)
        for _ in range(2):
            _, params, state = step(params, state)
        return params

    assert jax.jit(jax.value_and_grad(trained))(jnp.array(3.0)) == expected


# vmap


def test_seeds_in_parallel_equal_separate_runs(nowcaster: str | wnn_jax.Nowcaster):
    tx = adam_and_nowcast(nowcaster)
    together = train(tx, stack(seeds(3)), 12, transform=jax.vmap)
    separate = [train(tx, params, 12) for params in seeds(3)]
    for t, step in enumerate(together):
        assert_trees_close(step, stack([steps[t] for steps in separate]))
    assert together[-1].state[1].num_nowcasts.tolist() == [num_jumps(nowcaster, 6)] * 3


@pytest.mark.parametrize("nowcaster", ["linear", "slow-drift"])
def test_seeds_may_be_at_different_steps(nowcaster: str):
    tx = adam_and_nowcast(nowcaster)
    runs = [train(tx, params, 20)[3 + 3 * seed :] for seed, params in enumerate(seeds(3))]
    start = stack([run[0] for run in runs])
    together = train(tx, start.params, 10, state=start.state, transform=jax.vmap)
    for t, step in enumerate(together):
        assert_trees_close(step, stack([run[t + 1] for run in runs]))
    assert start.state[1].num_nowcasts.tolist() == [num_jumps(nowcaster, n) for n in (2, 3, 5)]
    assert together[-1].state[1].num_nowcasts.tolist() == [num_jumps(nowcaster, n) for n in (7, 8, 10)]


def test_a_bad_forecast_of_one_seed_is_its_own():
    def fn(history: Any, role: str, horizon: Any) -> jax.Array:
        return jnp.where(history[-1] > 10, jnp.nan, history[-1] + 1)

    tx = wnn_jax.nowcast(wnn_jax.leafwise(fn, context=1), snapshot_every=1)
    (step,) = train(tx, {"w": jnp.array([1.0, 20.0, 2.0])}, 1, gradient=ones_like, transform=jax.vmap)
    assert step.updates["w"].tolist() == [JUMP, 1, JUMP]
    assert step.state.num_nowcasts.tolist() == [1, 0, 1]
    assert step.state.num_rejected.tolist() == [0, 1, 0]


def test_a_bad_drift_of_one_seed_is_its_own():
    tx = wnn_jax.nowcast(HalfMemory(), snapshot_every=1)
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    good = train(tx, params, 3, gradient=ones_like, transform=jax.vmap)[-1]
    broken = {"w": good.params["w"].at[1].set(jnp.nan)}
    steps = train(tx, broken, 4, gradient=ones_like, transform=jax.vmap, state=good.state)
    (first, *others) = [step.updates["w"].tolist() for step in steps]
    assert first == [1.875, 1, 1.875]
    assert [other[::2] for other in others] == [[1.9375] * 2, [1.96875] * 2, [1.984375] * 2]
    assert steps[-1].state.num_rejected.tolist() == [0, 2, 0]
    assert steps[-1].state.num_snapshots.tolist() == [7, 1, 7]


@pytest.mark.slow
@pytest.mark.parametrize("nowcaster", ["linear", "slow-drift"])
def test_nested_vmap_equals_separate_runs(nowcaster: str):
    tx = adam_and_nowcast(nowcaster)
    params = stack([stack(seeds(3)), jax.tree.map(jnp.negative, stack(seeds(3)))])
    together = train(tx, params, 12, transform=lambda fn: jax.vmap(jax.vmap(fn)))
    for row in range(2):
        separate = train(tx, jax.tree.map(lambda leaf, row=row: leaf[row], params), 12, transform=jax.vmap)
        assert_trees_close(jax.tree.map(lambda leaf, row=row: leaf[row], together[-1]), separate[-1])


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("kind", "call_steps", "num_conditionals"), [("window", [3, 7], 2), ("drift", [1, 3, 5, 7], 1)]
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_forecast_is_made_only_on_the_steps_that_need_it(
    depth: int, kind: str, call_steps: list[int], num_conditionals: int
):
    """A conditional that `vmap` had turned into a select would run the nowcaster on every step."""
    calls: list[None] = []

    def fn(history: Any, role: str, horizon: Any) -> jax.Array:
        jax.debug.callback(lambda: calls.append(None))
        return history[-1] + 1

    class Listener(HalfMemory):
        def jump(self, *args: Any, **settings: Any) -> Any:
            jax.debug.callback(lambda: calls.append(None))
            return super().jump(*args, **settings)

    tx = wnn_jax.nowcast({"window": wnn_jax.leafwise(fn, context=2), "drift": Listener()}[kind], snapshot_every=2)
    batched = jnp.zeros((2,) * depth)
    step = make_step(tx, ones_like)
    init = tx.init
    for _ in range(depth):
        step, init = jax.vmap(step), jax.vmap(init)
    compiled_step = jax.jit(step)
    params, state = batched, init(batched)
    steps_with_calls = []
    for t in range(8):
        _, params, state = compiled_step(params, state)
        jax.effects_barrier()
        if calls:
            steps_with_calls.append(t)
            calls.clear()
    assert steps_with_calls == call_steps
    # The means are 1, 1.5 and 1.75.
    np.testing.assert_array_equal(params, np.full(batched.shape, 8 + {"window": 2, "drift": 4.25}[kind]))

    text = compiled_step.lower(params, state).compile().as_text()
    assert text is not None
    assert text.count(" conditional(") == num_conditionals


# Optax's wrappers


@pytest.mark.parametrize("nowcaster", [last_plus_one(context=2), HalfMemory()])
def test_masked_jumps_only_where_the_mask_is(nowcaster: Any):
    params = {"a": {"w": jnp.zeros(2), "b": jnp.zeros(3)}, "c": jnp.zeros([])}
    mask = {"a": {"w": True, "b": False}, "c": True}
    tx = optax.masked(wnn_jax.nowcast(nowcaster, snapshot_every=2), mask)
    steps = train(tx, params, 4, gradient=ones_like)
    expected = jax.tree.map(lambda p, jumps: jnp.full_like(p, JUMP if jumps else 1), params, mask)
    assert_trees_equal(steps[3].updates, expected)


@pytest.mark.parametrize(("nowcaster", "num_trees"), [("linear", 4), ("drift", 2)])
def test_masked_parameters_cost_no_history(nowcaster: str, num_trees: int):
    params = {"kernel": jnp.zeros((2, 3)), "step": jnp.zeros([], jnp.int32)}
    tx = optax.masked(wnn_jax.nowcast(nowcaster, snapshot_every=2), {"kernel": True, "step": False})
    shapes = [leaf.shape for leaf in jax.tree.leaves(tx.init(params).inner_state.history)]  # pyright: ignore[reportAttributeAccessIssue]
    assert shapes == [(2, 3)] * num_trees


def test_partition_with_nowcasts_of_different_rhythm():
    params = {name: jnp.zeros([]) for name in ("body", "head", "neck", "tail")}
    tx = optax.partition(
        {
            "body": wnn_jax.nowcast(last_plus_one(context=1), snapshot_every=2),
            "head": wnn_jax.nowcast(last_plus_one(context=3), snapshot_every=1),
            "drift": wnn_jax.nowcast(HalfMemory(), snapshot_every=2),
            "plain": optax.identity(),
        },
        {"body": "body", "head": "head", "neck": "drift", "tail": "plain"},
    )
    steps = train(tx, params, 6, gradient=ones_like)
    assert [step.updates["body"].item() for step in steps] == [1, JUMP, 1, JUMP, 1, JUMP]
    assert [step.updates["head"].item() for step in steps] == [1, 1, JUMP, 1, 1, JUMP]
    assert [step.updates["neck"].item() for step in steps] == [1, 1, 1, 2, 1, 2.5]
    assert [step.updates["tail"].item() for step in steps] == [1] * 6


def accumulate(tx: optax.GradientTransformation, num_micro_steps: int) -> optax.GradientTransformation:
    return optax.MultiSteps(tx, num_micro_steps).gradient_transformation()


@pytest.mark.parametrize("nowcaster", [*WINDOWS, HalfMemory()], indirect=True)
def test_after_multi_steps_of_adam(nowcaster: str | wnn_jax.Nowcaster):
    """Accumulating four equal gradients is a step of Adam, so every fourth micro-step is a step without them."""
    params = network_params()
    nowcast = wnn_jax.nowcast(nowcaster, snapshot_every=4)
    accumulated = train(optax.chain(accumulate(optax.adam(0.1), 4), nowcast), params, 24)
    plain = train(optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=1)), params, 6)
    for step, expected in zip(accumulated[3::4], plain, strict=True):
        assert_trees_close(step.params, expected.params)
        assert step.state[1].num_nowcasts == expected.state[1].num_nowcasts
    assert plain[-1].state[1].num_nowcasts == num_jumps(nowcaster, 6)
