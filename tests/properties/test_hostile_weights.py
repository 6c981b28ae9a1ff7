"""Forecasts of weights that are hard on arithmetic, and the jumps that are made of them.

Forecasts of finite windows are finite, weights that did not move stay, no weight goes beyond its bound, what is held
back is counted, and what is not finite is rejected, and nothing else.
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
from tests.properties.strategies import DTYPES, Tree, histories, num_examples, spoiled

_SHAPES = {"conv": (3, 3, 2, 4), "bias": (7,), "norm": ()}
_ROLES = {name: name for name in _SHAPES}
_DRIFTS = ("drift", "slow-drift")
# NiNo forecasts whole networks, which these leaves are not.
_WINDOWS = [
    name for name in wnn_jax.available() if name not in _DRIFTS and not hasattr(wnn_jax.load(name), "check_params")
]
_QUICK = [("linear", "float32"), ("linear", "float16")]
_CASES = sorted(itertools.product(_WINDOWS, DTYPES), key=lambda case: case not in _QUICK)
_NUM_VISITS = 12
_MAX_GAIN = 100.0
_HORIZONS = (5.0, 1.0, 40.0, 0.0, -7.0, 1e9, math.nan, math.inf, -math.inf, 2.4)
_SCALES = (1.0, 0.5, 0.0, 2.0, -1.0)


class Steps(NamedTuple):
    """Some steps: the weights before each, where the optimizer alone led, and where the step led."""

    before: Tree
    snapshots: Tree
    after: Tree


@pytest.mark.slow_but(len(_QUICK))
@pytest.mark.parametrize(("name", "dtype"), _CASES)
@hypothesis.settings(max_examples=num_examples(0.2))
@hypothesis.given(data=st.data())
def test_a_window_jumps_to_its_forecast_within_its_bound(name: str, dtype: str, data: st.DataObject):
    nowcaster: Any = wnn_jax.load(name)
    horizon, scale = data.draw(st.sampled_from(_HORIZONS)), data.draw(st.sampled_from(_SCALES))
    with jax.enable_x64(dtype == "float64"):
        targets = data.draw(histories(1 + nowcaster.context, _SHAPES, dtype))
        is_broken = data.draw(st.sampled_from([False, False, False, True]))
        if is_broken:
            targets = data.draw(spoiled(targets, {data.draw(st.integers(1, nowcaster.context))}, (math.nan,)))
        steps, forecast, metrics = jax.device_get(
            _jump(name)(_stacked(targets), np.float32(horizon), np.float32(scale))
        )
    used = nowcaster.default_horizon
    if getattr(nowcaster, "takes_horizon", True):
        used = min(max(round(min(np.nan_to_num(horizon, nan=1.0), 2.0**24)), 1), 2**24)
    is_rejected, may_be_rejected, num_cut = metrics["num_rejected"] == 1, is_broken, [0, 0]
    for key, snapshots in steps.snapshots.items():
        limits, window = jnp.finfo(snapshots.dtype), np.asarray(snapshots, np.longdouble)
        before, after = (np.asarray(tree[key][-1], np.longdouble) for tree in (steps.before, steps.after))
        predicted, last, tiny = np.asarray(forecast[key], np.longdouble), window[-1], 8 * float(limits.smallest_normal)
        if not snapshots.size:
            continue
        with np.errstate(all="ignore"):
            reach = used * np.ptp(window, axis=0)
            is_frozen = (window == last).all(axis=0)
            move = scale * np.clip(predicted - last, -reach, reach)
            rounding = 8 * float(limits.eps) * (np.abs(before) + np.abs(last) + np.abs(move)) + tiny
            # The arithmetic of a jump passes through numbers that are some times as large.
            size = np.maximum(np.abs(before), np.maximum(np.abs(last), np.abs(predicted)))
            may_be_rejected |= bool(((1 + abs(scale)) * 4 * size[~is_frozen] > float(limits.max)).any())
            beyond = np.abs(predicted - last) - reach
            slack = 1e-3 * reach + 64 * float(np.finfo(np.float32).eps) * np.abs(last) + rounding
            num_cut[0] += int((~is_frozen & (beyond > slack)).sum())
            num_cut[1] += int((~is_frozen & (beyond > -slack)).sum())
        assert (after[is_frozen] == last[is_frozen]).all() or np.abs(after - last)[is_frozen].max() <= tiny, key
        if not is_broken:
            assert np.isfinite(predicted).all(), key
            assert np.isfinite(after).all(), key
            assert (np.abs(after - last)[~is_frozen] <= (abs(scale) * reach + rounding)[~is_frozen]).all(), key
        if is_rejected or scale == 0:
            np.testing.assert_allclose(after, last, rtol=0, atol=tiny)
    assert metrics["num_nowcasts"] + metrics["num_rejected"] == 1
    assert metrics["num_misplaced"] == metrics["num_restarts"] == 0
    assert may_be_rejected or not is_rejected
    assert is_rejected or not is_broken
    assert is_rejected or num_cut[0] <= metrics["num_cut"] <= num_cut[1]


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(_DRIFTS, DTYPES)))
@hypothesis.settings(max_examples=num_examples(0.2))
@hypothesis.given(data=st.data())
def test_a_drift_goes_no_further_than_its_bound(name: str, dtype: str, data: st.DataObject):
    scale = data.draw(st.sampled_from(_SCALES))
    with jax.enable_x64(dtype == "float64"):
        targets = data.draw(histories(1 + _NUM_VISITS, _SHAPES, dtype))
        steps, metrics = jax.device_get(_drift(name)(_stacked(targets), np.float32(scale)))
    largest = max(float(np.abs(leaf.astype(float)).max(initial=0)) for tree in targets for leaf in tree.values())
    for key, landed in steps.after.items():
        limits = jnp.finfo(landed.dtype)
        before, led, after = (np.asarray(tree[key], np.longdouble) for tree in steps)
        assert np.isfinite(after).all(), key
        axes = tuple(range(1, after.ndim))
        # The mean is no longer than the longest way between two visits.
        ways = np.sqrt(((led[1:] - after[:-1]) ** 2).sum(axis=axes))
        lengths = np.sqrt(((after - led) ** 2).sum(axis=axes))
        rounding = 8 * float(limits.eps) * np.sqrt((before**2 + led**2 + after**2).sum(axis=axes))
        bound = _MAX_GAIN * abs(scale) * np.maximum.accumulate(np.concatenate([[0], ways])) * 1.001
        assert (lengths <= bound + rounding + 64 * float(limits.smallest_normal)).all(), key
    # The visit after a rejected jump only remembers where the weights are, and so does the first one.
    num_first = _NUM_VISITS - metrics["num_nowcasts"] - metrics["num_rejected"]
    assert num_first in (metrics["num_rejected"], metrics["num_rejected"] + 1)
    assert num_first >= 1
    assert metrics["num_misplaced"] == metrics["num_restarts"] == 0
    assert metrics["num_rejected"] == 0 or largest > float(jnp.finfo(dtype).max) / 1e4


def _stacked(trees: list[Tree]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _train(nowcaster: Any, targets: Any, **options: Any) -> tuple[Steps, dict[str, jax.Array]]:
    """Leads the weights to every target, or as far in its direction as the dtype has numbers for."""
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=1, roles=lambda _: _ROLES, **options)

    def update(target: jax.Array, param: jax.Array) -> jax.Array:
        dtype, largest = jnp.promote_types(param.dtype, jnp.float32), float(jnp.finfo(param.dtype).max)
        # What moves stays off the end, beyond which rounding would lead.
        goal = jnp.where(target == param, target, jnp.clip(target, -0.98 * largest, 0.98 * largest)).astype(dtype)
        return jnp.clip(goal - param.astype(dtype), -largest, largest).astype(param.dtype)

    def step(carry: Any, target: Any) -> Any:
        params, state = carry
        updates = jax.tree.map(update, target, params)
        jumped, state = tx.update(updates, state, params)
        after = optax.apply_updates(params, jumped)
        return (after, state), Steps(params, optax.apply_updates(params, updates), after)  # pyright: ignore[reportArgumentType]

    params = jax.tree.map(lambda leaf: leaf[0], targets)
    carry = params, tx.init(params)
    (_, state), steps = jax.lax.scan(step, carry, jax.tree.map(lambda leaf: leaf[1:], targets))
    return steps, wnn_jax.metrics(state)


@functools.cache
def _jump(name: str) -> Any:
    nowcaster: Any = wnn_jax.load(name)
    takes_horizon = getattr(nowcaster, "takes_horizon", True)

    @jax.jit
    def run(targets: Any, horizon: jax.Array, scale: jax.Array) -> Any:
        schedule = (lambda index: horizon) if takes_horizon else None
        steps, metrics = _train(nowcaster, targets, horizon=schedule, scale=lambda index: scale)
        window = [
            jax.tree.map(lambda leaf, time=time: leaf[time], steps.snapshots) for time in range(nowcaster.context)
        ]
        return steps, nowcaster(window, _ROLES, horizon if takes_horizon else None), metrics

    return run


@functools.cache
def _drift(name: str) -> Any:
    return jax.jit(lambda targets, scale: _train(wnn_jax.load(name), targets, scale=lambda index: scale))
