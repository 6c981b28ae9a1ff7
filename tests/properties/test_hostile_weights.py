"""Jumps of weights that are hard on arithmetic.

No weight goes beyond its bound, weights that did not move stay, and finite weights stay finite. Only broken weights, or
weights at the end of the range of their dtype, are rejected.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import wnn_jax
from tests.properties.nowcast_model import nowcaster_of
from tests.properties.strategies import DTYPES, Tree, histories, num_examples

_SHAPES = {"conv": (3, 3, 2, 4), "bias": (7,), "norm": ()}
_ROLES = {name: name for name in _SHAPES}
_DRIFTS = ("drift", "slow-drift")
# NiNo forecasts whole networks, which these leaves are not.
_NAMES = ["ahead-5", *(name for name in wnn_jax.available() if not hasattr(wnn_jax.load(name), "check_params"))]
_QUICK = [("ahead-5", "float32"), ("ahead-5", "float16"), ("drift", "bfloat16")]
_CASES = sorted(itertools.product(_NAMES, DTYPES), key=lambda case: case not in _QUICK)
_NUM_VISITS_OF_DRIFTS = 12
_MAX_GAIN = 100.0


class Steps(NamedTuple):
    """Some steps: the weights before each, where the optimizer alone led, and where the step led."""

    before: Tree
    led: Tree
    after: Tree


@pytest.mark.slow_but(len(_QUICK))
@pytest.mark.parametrize(("name", "dtype"), _CASES)
@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data(), scale=st.sampled_from([1.0, 0.5, 0.0, 2.0, -1.0]), is_broken=st.booleans())
def test_jumps_are_bounded_and_finite(name: str, dtype: str, data: st.DataObject, scale: float, is_broken: bool):
    nowcaster, is_drift = nowcaster_of(name), name in _DRIFTS
    is_broken &= not is_drift
    num_visits = _NUM_VISITS_OF_DRIFTS if is_drift else nowcaster.context
    targets = data.draw(histories(1 + num_visits, _SHAPES, dtype))
    if is_broken:
        key, index = data.draw(st.sampled_from(sorted(_SHAPES))), data.draw(st.integers(1, num_visits))
        targets[index][key] = np.array(targets[index][key])
        targets[index][key].flat[-1] = math.nan
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *targets)
    with jax.enable_x64(dtype == "float64"):
        steps, metrics = jax.device_get(_compiled_run(name)(stacked, np.float32(scale)))
    may_be_rejected, limits = is_broken, jnp.finfo(dtype)
    for key in _SHAPES:
        before, led, after = (np.asarray(tree[key], np.longdouble) for tree in steps)
        axes = tuple(range(1, led.ndim)) if is_drift else ()
        rounding = 8 * float(limits.eps) * np.sqrt((before**2 + led**2 + after**2).sum(axis=axes))
        with np.errstate(invalid="ignore"):
            reach = np.zeros_like(rounding)
            if is_drift:
                # A running mean is no longer than the longest displacement between two visits.
                ways = np.sqrt(((led[1:] - after[:-1]) ** 2).sum(axis=axes))
                reach[1:] = _MAX_GAIN * 1.001 * np.maximum.accumulate(ways)
            else:
                reach[-1] = getattr(nowcaster, "default_horizon", 5) * np.ptp(led, axis=0)
            # The arithmetic of a jump passes through numbers that are some times as large as the weights.
            share = 1e4 if is_drift else 16 * (1 + reach.max(initial=0) / max(float(np.abs(led).max()), 1e-300))
            may_be_rejected |= bool(np.abs(led).max() > float(limits.max) / share)
            lengths = np.sqrt(((after - led) ** 2).sum(axis=axes))
        if not is_broken:
            assert np.isfinite(after).all(), key
            assert (lengths <= abs(scale) * reach + rounding + 64 * float(limits.smallest_normal)).all(), key
        is_still = (led == led[-1]).all(axis=0)
        assert is_drift or (lengths[-1][is_still] <= 8 * float(limits.smallest_normal)).all(), key
    num_jumps = metrics["num_nowcasts"] + metrics["num_rejected"]
    assert metrics["num_misplaced"] == metrics["num_restarts"] == 0
    assert may_be_rejected or metrics["num_rejected"] == 0
    assert metrics["num_rejected"] == 1 or not is_broken
    # After a rejected jump, a visit to a drift only remembers where the weights are, and so does the first one.
    assert num_jumps == 1 or (is_drift and num_visits - num_jumps - metrics["num_rejected"] in (0, 1))


@functools.cache
def _compiled_run(name: str) -> Any:
    @jax.jit
    def run(targets: Any, scale: jax.Array) -> Any:
        tx = wnn_jax.nowcast(nowcaster_of(name), snapshot_every=1, roles=lambda _: _ROLES, scale=lambda index: scale)

        def step(carry: Any, target: Any) -> Any:
            params, state = carry
            updates = jax.tree.map(_update, target, params)
            jumped, state = tx.update(updates, state, params)
            after: Any = optax.apply_updates(params, jumped)
            led: Any = optax.apply_updates(params, updates)
            return (after, state), Steps(params, led, after)

        params = jax.tree.map(lambda leaf: leaf[0], targets)
        carry = params, tx.init(params)
        (_, state), steps = jax.lax.scan(step, carry, jax.tree.map(lambda leaf: leaf[1:], targets))
        return steps, wnn_jax.metrics(state)

    return run


def _update(target: jax.Array, param: jax.Array) -> jax.Array:
    """Return the update of a weight to its target, or as far in its direction as the dtype has numbers for."""
    dtype, largest = jnp.promote_types(param.dtype, jnp.float32), float(jnp.finfo(param.dtype).max)
    # Weights that move stay off the end of the range, beyond which rounding would lead.
    goal = jnp.where(target == param, target, jnp.clip(target, -0.98 * largest, 0.98 * largest)).astype(dtype)
    return jnp.clip(goal - param.astype(dtype), -largest, largest).astype(param.dtype)
