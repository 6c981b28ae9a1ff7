"""Windows of a running mean of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import train

EVERY, DECAY = 3, 0.9
# A power of two, so that no product is rounded: whether a compiler fuses it with a sum then changes nothing.
RATE = 2.0**-4
START = {"w": jnp.array([3.0, -2.0]), "b": jnp.array([0.5])}


def make_tx(nowcaster: Any = "linear", **options: Any) -> Any:
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
    steps = train(make_tx(scale=scale), START, 60)
    for index, step in enumerate(steps):
        param = param - RATE * (param - 1)
        mean = DECAY * mean + (1 - DECAY) * param
        if index % EVERY == EVERY - 1:
            window.append(mean)
            if len(window) == 5:
                jump = scale * (linear_ahead(window) - mean)
                param, mean, window = param + jump, mean + jump, []
        found = np.concatenate([step.params["w"], step.params["b"]])
        np.testing.assert_allclose(found, param, rtol=1e-4, atol=1e-5)
    assert steps[-1].state[1].num_nowcasts == 4


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_scale_0_training_is_plain_bit_for_bit(dtype: str):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), START)
    steps = train(make_tx(scale=0.0), params, 40)
    plain = train(optax.sgd(RATE), params, 40)
    for step, expected in zip(steps, plain, strict=True):
        jax.tree.map(np.testing.assert_array_equal, step.params, expected.params)
    assert steps[-1].state[1].num_nowcasts == 2


def test_the_mean_begins_with_the_parameters_of_the_first_step_whatever_those_of_init_were():
    tx = make_tx()
    steps = train(tx, START, 15, state=tx.init(jax.tree.map(jnp.zeros_like, START)))
    jax.tree.map(np.testing.assert_array_equal, steps[-1].params, train(tx, START, 15)[-1].params)


def test_a_forecast_that_is_not_finite_moves_neither():
    broken = wnn_jax.leafwise(lambda history, role, horizon: history[-1] * jnp.nan)
    steps = train(make_tx(broken), START, 5 * EVERY)
    plain = train(make_tx(scale=0.0), START, 5 * EVERY)
    jax.tree.map(np.testing.assert_array_equal, steps[-1].params, plain[-1].params)
    jax.tree.map(np.testing.assert_array_equal, steps[-1].state[1].history.mean, plain[-1].state[1].history.mean)
    assert steps[-1].state[1].num_rejected == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_is_one_more_tree_in_float32(dtype: str):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), START)
    state = train(make_tx(), params, 1)[-1].state[1]
    assert len(jax.tree.leaves(state.history)) == 5 * len(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.history)} == {"float32"}
    assert train(make_tx(), params, 1)[-1].params["w"].dtype == dtype


def test_seeds_in_parallel_equal_separate_runs():
    seeds = [jax.tree.map(lambda leaf, factor=factor: factor * leaf, START) for factor in (1.0, -2.0)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    together = train(make_tx(), batch, 20, transform=jax.vmap)[-1].params
    for index, params in enumerate(seeds):
        alone = train(make_tx(), params, 20)[-1].params
        jax.tree.map(
            lambda both, one, index=index: np.testing.assert_allclose(both[index], one, rtol=1e-6), together, alone
        )


def test_a_state_without_a_mean_is_refused():
    without = wnn_jax.nowcast("linear", snapshot_every=EVERY)
    state = without.init(START)
    with pytest.raises(ValueError, match=r"a window of 4 snapshots.*needs a window of 4 snapshots of a running mean"):
        wnn_jax.nowcast("linear", snapshot_every=EVERY, average=DECAY).update(START, state, START)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), True, "0.9"])
def test_average_must_be_a_decay(value: Any):
    with pytest.raises(ValueError, match=r"average=.*must be a finite float >= 0 and < 1"):
        make_tx(average=value)


def test_a_drift_takes_no_average():
    with pytest.raises(ValueError, match=r"average=0\.9 was given, but Drift goes by a drift"):
        make_tx("drift")
