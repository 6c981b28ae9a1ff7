"""Parameters that are not where the last update led are noticed and counted, and the history begins again."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import Step, network_params, ones_like, train
from wnn_jax._guards import Landmark

NOWCASTERS = ("linear", "slow-drift")


def nowcast(nowcaster: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return wnn_jax.nowcast(nowcaster, snapshot_every=2, **options)


def last_state(steps: list[Step]) -> wnn_jax.NowcastState:
    """The state of the only nowcast in an optimizer."""
    leaves = jax.tree.leaves(steps[-1].state, is_leaf=lambda node: isinstance(node, wnn_jax.NowcastState))
    (state,) = [leaf for leaf in leaves if isinstance(leaf, wnn_jax.NowcastState)]
    return state


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_a_nowcast_at_the_end_of_a_chain_is_never_misplaced(nowcaster: str, dtype: Any):
    steps = train(optax.chain(optax.adamw(3e-3), nowcast(nowcaster)), network_params(dtype), 40)
    state = last_state(steps)
    assert state.num_nowcasts > 3
    assert (state.counters.num_misplaced, state.counters.num_restarts) == (0, 0)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("nowcaster", NOWCASTERS)
@pytest.mark.parametrize(
    "after",
    [optax.adam(1e-2), optax.scale(-1e-2), optax.scale(0.5), optax.scale_by_sign(), optax.clip(1e-4)],
    ids=["adam", "learning rate", "half", "sign", "clip"],
)
def test_what_comes_after_a_nowcast_and_changes_its_updates_is_noticed(nowcaster: str, after: Any):
    tx = optax.chain(optax.sgd(0.1), nowcast(nowcaster), after)
    state = last_state(train(tx, network_params(), 20))
    assert state.num_nowcasts == 0, "a jump was counted that was never made"
    # The first step has nothing before it.
    assert state.counters.num_misplaced == 19


def test_a_jump_that_is_clipped_is_noticed():
    far = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + 5 * (history[-1] - history[-2]))
    tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast(far, snapshot_every=1), optax.clip(0.15))
    steps = train(tx, {"w": jnp.zeros(3)}, 10, gradient=ones_like)
    assert [int(step.state[1].counters.num_misplaced) for step in steps] == [0] * 5 + [1] * 5
    assert steps[-1].state[1].num_nowcasts == 2


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
def test_parameters_that_were_edited_begin_another_history(nowcaster: str):
    tx = optax.chain(optax.sgd(0.1), nowcast(nowcaster))
    before = train(tx, network_params(), 5)[-1]
    edited = jax.tree.map(lambda leaf: 1 - leaf, before.params)
    (after,) = train(tx, edited, 1, state=before.state)
    state = last_state([after])
    assert (state.counters.num_misplaced, state.counters.num_restarts) == (1, 1)
    # The sixth step records the first snapshot of another history.
    assert state.num_snapshots == 1


def test_an_edit_between_two_snapshots_is_remembered_until_the_next():
    tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast("linear", snapshot_every=4))
    before = train(tx, network_params(), 13)[-1]
    assert last_state([before]).num_snapshots == 3
    steps = train(tx, jax.tree.map(jnp.negative, before.params), 3, state=before.state)
    assert [int(last_state([step]).num_snapshots) for step in steps] == [0, 0, 1]
    assert last_state(steps).counters.num_restarts == 1


def test_the_mean_of_an_averaged_window_begins_again_with_it():
    tx = optax.chain(optax.sgd(0.1), nowcast("linear", average=0.9))
    before = train(tx, network_params(), 4)[-1]
    elsewhere = jax.tree.map(lambda leaf: leaf + 100, before.params)
    (after,) = train(tx, elsewhere, 1, state=before.state, gradient=functools.partial(jax.tree.map, jnp.zeros_like))
    for mean, param in zip(
        jax.tree.leaves(last_state([after]).history.mean),  # pyright: ignore[reportAttributeAccessIssue]
        jax.tree.leaves(elsewhere),
        strict=True,
    ):
        np.testing.assert_allclose(mean, param, rtol=1e-6)


def test_a_step_that_was_not_finite_and_was_taken_back_is_noticed():
    tx = optax.chain(optax.sgd(0.1), nowcast("linear"))
    params = network_params()
    before = train(tx, params, 3)[-1]
    to_nan = functools.partial(jax.tree.map, lambda param: param * jnp.nan)
    broken = train(tx, before.params, 1, state=before.state, gradient=to_nan)
    taken_back = train(tx, before.params, 1, state=broken[-1].state)
    assert last_state(broken).counters.num_misplaced == 0
    assert last_state(taken_back).counters.num_misplaced == 1
    gone_on = train(tx, broken[-1].params, 1, state=broken[-1].state)
    assert last_state(gone_on).counters.num_misplaced == 0


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
        lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
        lambda tx: optax.chain(tx, optax.identity()),
    ],
    ids=["apply_if_finite", "MultiSteps", "masked", "identity"],
)
def test_what_keeps_updates_and_state_together_is_not_misplaced(wrap: Callable[[Any], Any]):
    tx = wrap(optax.chain(optax.sgd(0.1), nowcast("linear")))
    state = last_state(train(tx, network_params(), 36))
    assert state.num_nowcasts >= 1
    assert state.counters.num_misplaced == 0


def test_without_jit_there_is_one_warning():
    tx = optax.chain(wnn_jax.nowcast("drift"), optax.scale(0.1))
    params = {"w": jnp.zeros(3)}
    state = tx.init(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            updates, state = tx.update({"w": jnp.ones(3)}, state, params)
            params = optax.apply_updates(params, updates)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "the parameters are not where the last update of wnn_jax.nowcast led"
    ]


def test_only_small_tensors_are_looked_at():
    params = {"large": jnp.zeros((64, 64)), **{f"small_{index}": jnp.zeros(index) for index in range(12)}}
    assert Landmark.unknown(params).position.shape == (4, 3)
    assert Landmark.unknown({"large": jnp.zeros((64, 64))}).position.shape == (1, 3)
    assert Landmark.unknown({"empty": jnp.zeros(0)}).position.shape == (0, 3)
