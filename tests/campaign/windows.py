"""Forecasts of hostile windows, and the jumps that are made of them.

Held, for every nowcaster and dtype: of finite windows forecasts are finite; weights that did not move stay; a jump
takes no weight further than its bound, and it says how many it held back; what is not finite is rejected, and nothing
else is. Drifts go no further than a hundred times their longest mean, and lead to finite weights.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from tests.campaign.hostile import DTYPES, draw_tree
from tests.campaign.part import Part, Verdict
from wnn_jax._nowcaster import is_drift, offsets_of

# Around the size of a chunk on CPU, and of several ranks.
_SHAPES = {
    "conv": (2, 8, 512),
    "dense": (8191,),
    "bias": (8193,),
    "bias_1": (0,),
    "norm": (2,),
    "embedding": (1,),
}
_SHAPES_OF_DRIFT = {
    "conv": (3, 3, 2, 4),
    "dense": (12, 20),
    "bias": (7,),
    "bias_1": (0,),
    "norm": (),
    "embedding": (9, 4),
}
_NUM_VISITS = 24
# Compiling takes longest, and a process has no room for the programs of all nowcasters and dtypes at once.
_NUM_TREES = 21
_NUM_TREES_OF_DRIFT = 60
_NUM_PROGRAMS = 24
_HORIZONS = (1.0, 5.0, 40.0, 0.0, -7.0, 1e9, math.nan, math.inf, -math.inf, 2.4)
_SCALES = (1.0, 1.0, 1.0, 0.0, 0.5, 2.0, -1.0)
_MAX_GAIN = 100.0
_OTHERS = ("wnn of the published size", "learned drift")
NOWCASTERS = (*wnn_jax.available(), *_OTHERS)


class _Outcome(NamedTuple):
    """What came of a window: trees of arrays, and counts."""

    before: Any
    snapshots: Any
    after: Any
    forecast: Any
    counts: dict[str, jax.Array]


def check(rng: np.random.Generator, folder: Path) -> Verdict:
    """Draws a nowcaster and a dtype, and then trees of windows, horizons and scales."""
    del folder
    name = NOWCASTERS[rng.integers(len(NOWCASTERS))]
    dtype = jnp.dtype(DTYPES[rng.integers(len(DTYPES))])
    nowcaster, num_windows, failures = _nowcaster(name), 0, list[str]()
    takes_horizon = not is_drift(nowcaster) and nowcaster.takes_horizon and rng.random() < 0.8
    with jax.enable_x64(dtype == jnp.float64):
        for tree in range(_NUM_TREES_OF_DRIFT if is_drift(nowcaster) else _NUM_TREES):
            scale = _SCALES[rng.integers(len(_SCALES))]
            if is_drift(nowcaster):
                num_new, others = _check_drift(rng, name, dtype, scale)
            else:
                num_new, others = _check_window(rng, name, dtype, scale, takes_horizon)
            num_windows += num_new
            failures += [f"{name}, {dtype}, tree {tree}, {failure}" for failure in others]
    if not is_drift(nowcaster):
        failures += _judge_bad_horizons(nowcaster)
    return Verdict({f"{name}, {dtype}": num_windows}, tuple(failures))


def _check_window(
    rng: np.random.Generator, name: str, dtype: Any, scale: float, takes_horizon: bool
) -> tuple[int, list[str]]:
    nowcaster = _nowcaster(name)
    horizon = _HORIZONS[rng.integers(len(_HORIZONS))]
    num_visits = offsets_of(nowcaster)[-1] + 1
    targets = draw_tree(rng, 1 + num_visits, _SHAPES, dtype)
    event = str(rng.choice(["finite", "mask", "broken"], p=[0.8, 0.1, 0.1]))
    if event != "finite":
        leaf = targets[0 if event == "mask" else rng.integers(1 + num_visits)]["conv"]
        leaf.flat[rng.integers(leaf.size)] = np.inf if event == "mask" else np.nan
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *targets)
    program = _program(name, str(dtype), takes_horizon)
    outcome = jax.device_get(program(stacked, np.float32(horizon), np.float32(scale)))
    used = nowcaster.default_horizon
    if takes_horizon:
        used = min(max(round(min(np.nan_to_num(horizon, nan=1.0), 2.0**24)), 1), 2**24)
    failures = _judge(outcome, name, used, scale, event)
    chosen = f"horizon {horizon if takes_horizon else None}, scale {scale}, {event}"
    return sum(math.prod(shape) for shape in _SHAPES.values()), [f"{chosen}: {failure}" for failure in failures]


def _judge_bad_horizons(nowcaster: Any) -> list[str]:
    """Integers of Python that are out of range are refused."""
    window = [{"w": jnp.zeros(1)}] * nowcaster.context
    failures: list[str] = []
    for horizon in (0, -1):
        try:
            nowcaster(window, {"w": "bias"}, horizon)
        except ValueError as error:
            if f"horizon={horizon}" not in str(error):
                failures.append(f"horizon={horizon} is refused with: {error}")
        else:
            failures.append(f"horizon={horizon} is not refused")
    return failures


@functools.cache
def _nowcaster(name: str) -> Any:
    if name not in _OTHERS:
        return wnn_jax.load(name)
    if name == "wnn of the published size":
        return wnn_jax.nowcasters.WNN.init(jax.random.key(0))
    learned = wnn_jax.nowcasters.LearnedDrift.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), learned.params)
    return wnn_jax.nowcasters.LearnedDrift(params, learned.rule, learned.num_means)


def _roles(params: Any) -> dict[str, str]:
    return {name: name.partition("_")[0] for name in params}


def _updates(targets: Any, params: Any) -> Any:
    """The updates that lead near the targets, or as far in their direction as the dtype has numbers for."""

    def update(target: jax.Array, param: jax.Array) -> jax.Array:
        wide, largest = jnp.promote_types(param.dtype, jnp.float32), float(jnp.finfo(param.dtype).max)
        # What is not there yet stays off the end, which rounding would go beyond.
        goal = jnp.where(target == param, target, jnp.clip(target, -0.98 * largest, 0.98 * largest)).astype(wide)
        return jnp.clip(goal - param.astype(wide), -largest, largest).astype(param.dtype)

    return jax.tree.map(update, targets, params)


@functools.lru_cache(maxsize=_NUM_PROGRAMS)
def _program(name: str, dtype: str, takes_horizon: bool) -> Any:
    """What makes an outcome of a window; for one dtype, so that it is forgotten with its program."""
    nowcaster = _nowcaster(name)

    @jax.jit
    def run(targets: Any, horizon: jax.Array, scale: jax.Array) -> _Outcome:
        tx = wnn_jax.nowcast(
            nowcaster,
            snapshot_every=1,
            roles=_roles,
            horizon=(lambda index: horizon) if takes_horizon else None,
            scale=lambda index: scale,
        )

        def step(carry: Any, target: Any) -> Any:
            params, state = carry
            updates = _updates(target, params)
            snapshot = optax.apply_updates(params, updates)
            jumped, state = tx.update(updates, state, params)
            return (optax.apply_updates(params, jumped), state), (params, snapshot)

        params = jax.tree.map(lambda leaf: leaf[0], targets)
        following = jax.tree.map(lambda leaf: leaf[1:], targets)
        (after, state), (before, snapshots) = jax.lax.scan(step, (params, tx.init(params)), following)
        offsets = np.asarray(offsets_of(nowcaster))
        snapshots = jax.tree.map(lambda leaf: leaf[offsets], snapshots)
        window = [jax.tree.map(lambda leaf, index=index: leaf[index], snapshots) for index in range(len(offsets))]
        forecast = nowcaster(window, _roles(params), horizon if takes_horizon else None)
        before = jax.tree.map(lambda leaf: leaf[-1], before)
        return _Outcome(before, snapshots, after, forecast, _counts(state))

    return run


def _counts(state: Any) -> dict[str, jax.Array]:
    names = ("num_nowcasts", "num_rejected", "num_cut", "num_snapshots", "num_misplaced", "num_restarts")
    return {name: getattr(state, name) for name in names}


def _judge(outcome: _Outcome, name: str, horizon: int, scale: float, event: str) -> list[str]:
    counts = {key: int(count) for key, count in outcome.counts.items()}
    is_finite = all(np.isfinite(leaf).all() for leaf in outcome.snapshots.values())
    is_rejected, is_rightly_rejected, least_cut, most_cut = counts["num_rejected"] == 1, event == "broken", 0, 0
    failures: list[str] = []
    for key, snapshots in outcome.snapshots.items():
        if not snapshots.size:
            continue
        limits = jnp.finfo(snapshots.dtype)
        wide_eps = float(jnp.finfo(jnp.promote_types(snapshots.dtype, jnp.float32)).eps)
        largest, tiny = float(limits.max), float(limits.smallest_normal)
        with np.errstate(all="ignore"):
            window = np.asarray(snapshots, np.longdouble)
            before, after, forecast = (
                np.asarray(tree[key], np.longdouble) for tree in (outcome.before, outcome.after, outcome.forecast)
            )
            last, reach = window[-1], horizon * (window.max(axis=0) - window.min(axis=0))
            is_frozen = (window == window[-1]).all(axis=0)
            move = np.where(is_frozen, 0, scale * np.clip(forecast - last, -reach, reach))
            rounding = 8 * float(limits.eps) * (np.abs(before) + np.abs(last) + np.abs(move)) + 8 * tiny
            # In the middle of reckoning there are numbers twice as large as the scale times the farthest distance.
            size = np.maximum(np.abs(before), np.maximum(np.abs(last), np.abs(forecast)))
            is_rightly_rejected |= bool(((1 + abs(scale)) * 4 * size[~is_frozen] > largest).any())
            beyond = np.abs(forecast - last) - reach
            slack = 1e-3 * reach + 64 * wide_eps * np.abs(last) + rounding
            least_cut += int((~is_frozen & (beyond > slack)).sum())
            most_cut += int((~is_frozen & (beyond > -slack)).sum())
            moved = np.abs(after - last)
            is_off = ~is_frozen & (moved > abs(scale) * reach + rounding)
        if is_finite and not np.isfinite(forecast).all():
            failures.append(f"{key}: {_worst(~np.isfinite(forecast), snapshots)} is forecast as not finite")
        keeps_frozen = not name.startswith("wnn")
        if is_finite and keeps_frozen and (is_moved := is_frozen & (np.abs(forecast - last) > 2 * tiny)).any():
            failures.append(f"{key}: {_worst(is_moved, snapshots)} did not move, and is forecast to")
        if (is_moved := is_frozen & ((after != last) & ~(moved <= 2 * tiny))).any():
            failures.append(f"{key}: {_worst(is_moved, snapshots)} did not move, and jumps")
        if is_off.any():
            failures.append(f"{key}: {_worst(is_off, snapshots)} jumps by {moved[is_off].max():.3g}")
        if is_finite and not np.isfinite(after).all():
            failures.append(f"{key}: {_worst(~np.isfinite(after), snapshots)} jumps to what is not finite")
        if (is_rejected or scale == 0) and not _same(outcome.after[key], snapshots[-1]):
            failures.append(f"{key}: there was no jump, and the weights are not where the step led")
    if counts["num_nowcasts"] + counts["num_rejected"] != 1 or counts["num_snapshots"] != 0:
        failures.append(f"after one window there are {counts}")
    if counts["num_misplaced"] or counts["num_restarts"]:
        failures.append(f"nobody moved the parameters, and there are {counts}")
    if is_rejected and not is_rightly_rejected:
        failures.append("the jump was rejected")
    if event == "broken" and not is_rejected:
        failures.append("the jump was not rejected")
    if not is_rejected and is_finite and not least_cut <= counts["num_cut"] <= most_cut:
        failures.append(f"{counts['num_cut']} weights were cut, which should be {least_cut} to {most_cut}")
    return failures


def _check_drift(rng: np.random.Generator, name: str, dtype: Any, scale: float) -> tuple[int, list[str]]:
    targets = draw_tree(rng, 1 + _NUM_VISITS, _SHAPES_OF_DRIFT, dtype)
    largest = max(float(np.abs(leaf.astype(np.float64)).max(initial=0)) for tree in targets for leaf in tree.values())
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *targets)
    outcome = jax.device_get(_drift_program(name)(stacked, np.float32(scale)))
    failures: list[str] = []
    for key, jumped in outcome.after.items():
        before, landed = (np.asarray(tree[key], np.longdouble) for tree in (outcome.snapshots, outcome.after))
        axes = tuple(range(1, landed.ndim))
        if not np.isfinite(landed).all():
            failures.append(
                f"{key}: there are weights that are not finite at visit {np.argwhere(~np.isfinite(landed))[0][0]}"
            )
            continue
        length = np.sqrt(((landed - before) ** 2).sum(axis=axes))
        limits = jnp.finfo(jumped.dtype)
        rounding = 8 * float(limits.eps) * np.sqrt((before**2 + landed**2).sum(axis=axes)) + 64 * float(
            limits.smallest_normal
        )
        bound = _MAX_GAIN * abs(scale) * outcome.forecast[key].astype(np.longdouble) * 1.001 + rounding
        # What is not finite in the means was rejected.
        if (is_off := (length != 0) & ~(length <= bound)).any():
            visit = np.argmax(is_off)
            failures.append(f"{key}: at visit {visit} a jump of {length[visit]:.3g}, the bound is {bound[visit]:.3g}")
    counts = {key: int(count) for key, count in outcome.counts.items()}
    # Each rejected jump is followed by a visit that only remembers where the parameters are.
    num_first = _NUM_VISITS - counts["num_nowcasts"] - counts["num_rejected"]
    if num_first not in (counts["num_rejected"], counts["num_rejected"] + 1) or num_first < 1:
        failures.append(f"after {_NUM_VISITS} visits there are {counts}")
    if counts["num_misplaced"] or counts["num_restarts"]:
        failures.append(f"nobody moved the parameters, and there are {counts}")
    # Whatever the weights are, the network of a learned drift is given numbers of float32.
    dtypes = (dtype, jnp.float32) if name == "learned drift" else (dtype,)
    if counts["num_rejected"] and largest < min(float(jnp.finfo(dtype).max) for dtype in dtypes) / 1e4:
        failures.append(f"of weights up to {largest:.3g} there are {counts}")
    num_weights = sum(math.prod(shape) for shape in _SHAPES_OF_DRIFT.values())
    return num_weights * _NUM_VISITS, [f"scale {scale}: {failure}" for failure in failures]


@functools.cache
def _drift_program(name: str) -> Any:
    nowcaster = _nowcaster(name)

    @jax.jit
    def run(targets: Any, scale: jax.Array) -> _Outcome:
        tx: Any = wnn_jax.nowcast(nowcaster, snapshot_every=1, roles=_roles, scale=lambda index: scale)

        def step(carry: Any, target: Any) -> Any:
            params, state = carry
            updates = _updates(target, params)
            snapshot = optax.apply_updates(params, updates)
            jumped, state = tx.update(updates, state, params)
            after = optax.apply_updates(params, jumped)

            def longest(*means: jax.Array) -> jax.Array:
                # Scaled, for squares overflow and vanish.
                least = jnp.finfo(means[0].dtype).smallest_normal
                sizes = [jnp.maximum(jnp.max(jnp.abs(mean), initial=0), least) for mean in means]
                lengths = [
                    size * jnp.linalg.norm((mean / size).ravel()) for mean, size in zip(means, sizes, strict=True)
                ]
                return functools.reduce(jnp.maximum, lengths)

            return (after, state), (snapshot, after, jax.tree.map(longest, *state.history.means))

        params = jax.tree.map(lambda leaf: leaf[0], targets)
        following = jax.tree.map(lambda leaf: leaf[1:], targets)
        (_, state), (snapshots, after, lengths) = jax.lax.scan(step, (params, tx.init(params)), following)
        return _Outcome(None, snapshots, after, lengths, _counts(state))

    return run


def _same(one: Any, other: Any) -> bool:
    """Whether arrays are equal, but for the numbers below the least normal one, which devices take for 0."""
    one, other = (np.asarray(values) for values in (one, other))
    tiny = float(jnp.finfo(one.dtype).smallest_normal)
    with np.errstate(all="ignore"):
        is_tiny = (np.abs(one) < tiny) & (np.abs(other) < tiny)
        return bool(((one == other) | is_tiny | (np.isnan(one) & np.isnan(other))).all())


def _worst(is_bad: np.ndarray, snapshots: np.ndarray) -> str:
    """The window of one of the bad weights."""
    index = tuple(np.argwhere(is_bad)[0])
    return f"{int(is_bad.sum())} weights, one of them with {[float(snapshot[index]) for snapshot in snapshots]},"


PART = Part(num_cases=400, num_tested=1, check=check)
