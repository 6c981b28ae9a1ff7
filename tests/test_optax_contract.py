"""What Optax asks of its own contributed optimizers, asked of `nowcast`."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import wnn_jax
from tests.helpers import (
    DRIFTS,
    HalfMemory,
    Step,
    assert_trees_close,
    assert_trees_equal,
    history_trees,
    last_plus_one,
    make_step,
    network_params,
    num_jumps,
    ones_like,
    pull_to_one,
    train,
)

# Optax's types say of a state no more than that it is some tree.
nowcast: Any = wnn_jax.nowcast
map_params: Any = optax.tree.map_params
inject_hyperparams: Any = optax.inject_hyperparams

SNAPSHOT_EVERY = 2
JUMP_STEP = 5 * SNAPSHOT_EVERY - 1
NUM_STEPS = JUMP_STEP + 3


@pytest.fixture(scope="module")
def tx(nowcaster: str | wnn_jax.Nowcaster) -> Any:
    return optax.chain(optax.adam(0.1), nowcast(nowcaster, snapshot_every=SNAPSHOT_EVERY))


@pytest.fixture(scope="module")
def steps(tx: Any) -> list[Step]:
    """An undisturbed run over one jump, compiled, on one device."""
    return train(tx, network_params(), NUM_STEPS)


def types(tree: Any) -> Any:
    """Shapes, dtypes, and shardings over explicit axes."""
    return jax.tree.map(jax.typeof, tree)


def test_unknown_extra_args_are_accepted(nowcaster: str | wnn_jax.Nowcaster):
    tx = nowcast(nowcaster, snapshot_every=SNAPSHOT_EVERY)
    params = {"w": jnp.ones(3)}
    update = jax.jit(lambda state: tx.update(params, state, params, value=jnp.array(0.5), unexpected="argument"))
    updates, state = update(tx.init(params))
    assert_trees_equal(updates, params)
    assert state.count == 1


def test_the_second_step_does_not_compile(tx: Any, caplog: pytest.LogCaptureFixture):
    step = jax.jit(make_step(tx, pull_to_one))
    params = network_params()
    state = tx.init(params)
    num_compilations = []
    for _ in range(NUM_STEPS):
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            _, params, state = step(params, state)
        num_compilations.append(sum("Finished XLA compilation" in message for message in caplog.messages))
    assert num_compilations == [1] + [0] * (NUM_STEPS - 1)


def test_map_params_finds_the_history(tx: Any, nowcaster: str | wnn_jax.Nowcaster):
    params = network_params()
    specs = {"Conv_0": {"kernel": "k", "bias": "b"}}
    mapped = map_params(tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: "scalar")
    adam_state, nowcast_state = mapped
    assert adam_state[0].mu == specs
    assert history_trees(nowcast_state.history) == [specs] * (2 if nowcaster in DRIFTS else 4)
    assert set(jax.tree.leaves(nowcast_state._replace(history="scalar"))) == {"scalar"}


@pytest.mark.parametrize("roles", [{"w": "dense"}, lambda params: dict.fromkeys(params, "dense")])
def test_map_params_needs_no_roles(roles: Any):
    tx = nowcast(snapshot_every=1, roles=roles)
    mapped = map_params(tx, lambda leaf: leaf + 1, tx.init({"w": jnp.zeros(2)}))
    assert all((tree["w"] == 1).all() for tree in history_trees(mapped.history))
    assert mapped.count == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("gradient_dtype", ["same", "float32"])
def test_the_state_keeps_its_types(nowcaster: str | wnn_jax.Nowcaster, dtype: str, gradient_dtype: str):
    with jax.enable_x64(dtype == "float64"):
        params = {"kernel": jnp.ones((2, 3), dtype), "bias": jnp.ones(3, dtype)}
        tx = nowcast(nowcaster, snapshot_every=1)
        state = tx.init(params)
        updates = jax.tree.map(lambda p: p if gradient_dtype == "same" else p.astype(gradient_dtype), params)
        # A conditional and a scan refuse a state whose types change.
        step = jax.eval_shape(
            lambda: jax.lax.scan(
                lambda state, _: jax.lax.cond(
                    state.count == 3, lambda: (state, updates), lambda: tx.update(updates, state, params)[::-1]
                ),
                state,
                length=5,
            )
        )
        new_state, new_updates = step
        assert types(new_state) == types(state)
        assert jax.tree.map(lambda x: x.dtype, new_updates) == jax.tree.map(lambda x: x.dtype, updates)
        means = state.history.mean if nowcaster in DRIFTS else ()
        assert {x.dtype for x in jax.tree.leaves(means)} <= {jnp.promote_types(dtype, jnp.float32)}
        kept = history_trees(state.history)[: 1 if means else None]
        assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}


def test_float64_is_not_rounded_to_float32():
    with jax.enable_x64(True):
        tx = nowcast(last_plus_one(), snapshot_every=1, horizon=10**12)  # Far enough for the bound.
        steps = train(tx, jnp.zeros(3, jnp.float64), 5, gradient=lambda params: jnp.full_like(params, 1e-12))
        assert steps[-1].params.dtype == jnp.float64
        assert (jnp.abs(steps[-1].params - (1 + 5e-12)) < 1e-15).all()


def test_inject_hyperparams_changes_nothing(nowcaster: str | wnn_jax.Nowcaster):
    kwargs: dict[str, Any] = {"snapshot_every": SNAPSHOT_EVERY, "scale": 0.5, "start": 1, "stop": 100}
    if nowcaster == "linear":
        kwargs["horizon"] = 3
    params = network_params()
    sgd, inject = optax.sgd(0.1), inject_hyperparams(nowcast, static_args="nowcaster")
    injected = train(optax.chain(sgd, inject(nowcaster, **kwargs)), params, NUM_STEPS)
    plain = train(optax.chain(sgd, nowcast(nowcaster, **kwargs)), params, NUM_STEPS)
    assert set(injected[-1].state[1].hyperparams) == set(kwargs)
    for step, expected in zip(injected, plain, strict=True):
        assert_trees_close((step.params, step.state[1].inner_state), (expected.params, expected.state[1]))
    assert plain[-1].state[1].num_nowcasts == num_jumps(nowcaster, NUM_STEPS // SNAPSHOT_EVERY)


def test_injected_hyperparams_can_be_changed():
    params = {"w": jnp.zeros([])}
    tx = inject_hyperparams(nowcast, static_args="nowcaster")(HalfMemory(), snapshot_every=2)
    *_, last = train(tx, params, 4, gradient=ones_like)
    last.state.hyperparams["snapshot_every"] = jnp.array(1)
    last.state.hyperparams["scale"] = jnp.array(10.0)
    steps = train(tx, last.params, 3, gradient=ones_like, state=last.state)
    assert last.updates["w"] == 2
    # Another history begins with the other spacing.
    assert [step.updates["w"].item() for step in steps] == [1, 1 + 5, 1 + 7.5]


def test_inside_multi_steps(tx: Any, steps: list[Step]):
    params = network_params()
    accumulated = train(optax.MultiSteps(tx, 3).gradient_transformation(), params, 3 * NUM_STEPS)
    for t, step in enumerate(accumulated):
        if t % 3 == 2:
            assert_trees_close(step.params, steps[t // 3].params)
            assert_trees_close(step.state.inner_opt_state, steps[t // 3].state)
        else:
            assert_trees_equal(step.updates, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_init_of_abstract_parameters(nowcaster: str | wnn_jax.Nowcaster, dtype: Any):
    tx = nowcast(nowcaster, snapshot_every=1)
    params = network_params(dtype)
    abstract = jax.eval_shape(lambda: params)
    expected = types(tx.init(params))
    assert types(tx.init(abstract)) == expected
    assert types(jax.eval_shape(tx.init, abstract)) == expected
    assert types(jax.jit(tx.init)(params)) == expected


@pytest.mark.parametrize("t", [2 * SNAPSHOT_EVERY, 2 * SNAPSHOT_EVERY - 1, JUMP_STEP])
def test_jit_equals_eager(tx: Any, steps: list[Step], t: int):
    before = steps[t - 1]
    assert_trees_close(make_step(tx, pull_to_one)(before.params, before.state), steps[t])
