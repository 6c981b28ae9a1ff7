"""Schedules of `nowcast` against a plain reference that is written from its documentation.

A case is a training of up to 80 steps with made-up updates. Its settings change, its parameters are edited, a gradient
is not finite, other transformations come after `nowcast`, its count comes to an end. The reference is told where the
parameters are at each step, so that rounding does not add up, and says where the step leads and what is counted.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from tests.campaign.part import Part, Verdict
from tests.helpers import HalfMemory
from wnn_jax._nowcaster import is_drift

_SEGMENT = 20
_MAX_COUNT = 2**31 - 1
_TABLE = 16
_HORIZONS = (1.0, 2.0, 5.0, 40.0, 0.0, -3.0, 2.6, 1e6, np.nan)
_SCALES = (1.0, 1.0, 1.0, 0.5, 2.0, 0.0, -0.5)
# A single weight is found exactly where it is; of larger tensors only sums and extremes are looked at.
_LAYOUTS = {
    "points": {"kernel": (1, 1), "bias": (1,), "scale": ()},
    "tensors": {"kernel": (5, 4), "bias": (4,), "nothing": (0, 2)},
}
_MAX_GAIN = 100.0


class _Config(NamedTuple):
    """What a program is compiled for."""

    nowcaster: str
    layout: str
    dtype: str
    history_dtype: Any
    has_average: bool
    has_adam: bool


class _Settings(NamedTuple):
    """What may change from segment to segment, arrays all."""

    snapshot_every: Any
    start: Any
    stop: Any
    average: Any
    horizons: Any
    scales: Any
    factor: Any
    limit: Any


class _Inputs(NamedTuple):
    """What happens at each of the steps of a segment.

    Attributes:
      updates: what nowcast is given.
      edit: what is done to the parameters before the step: 0 nothing, 1 something is added, 2 they are replaced.
      edits: by what.
    """

    updates: Any
    edit: Any
    edits: Any


class _Seen(NamedTuple):
    """What a step was: the parameters before it, what `nowcast` made of the updates, and its state's counts."""

    params: Any
    updates: Any
    counts: Any


_COUNTS = ("num_nowcasts", "num_rejected", "num_cut", "num_snapshots", "num_misplaced", "num_restarts")


@functools.cache
def _nowcasters() -> dict[str, Any]:
    def ahead(history: Any, role: str, horizon: Any) -> Any:
        return history[-1] + 0.4 * (5 if horizon is None else horizon) * (history[-1] - history[0]) + 0.01

    def wild(history: Any, role: str, horizon: Any) -> Any:
        # Not finite where a weight is above 1, and farther than any bound elsewhere.
        return jnp.where(history[-1] > 1, jnp.nan, history[-1] + 50 * (history[-1] - history[0]))

    fakes = {
        f"{fn.__name__}-{context}": wnn_jax.leafwise(fn, context=context)
        for fn, contexts in ((ahead, (1, 2, 4, 5)), (wild, (2, 3, 6)))
        for context in contexts
    }
    loaded = {name: wnn_jax.load(name) for name in ("linear", "adaptive-linear", "drift", "slow-drift")}
    return {**fakes, **loaded, "far drift": HalfMemory(gain=130.0, num_means=2)}


def check(rng: np.random.Generator, folder: Path) -> Verdict:
    """Draws a training, lets it run, and compares every step."""
    del folder
    name = str(rng.choice(list(_nowcasters())))
    layout, dtype = (("points", "float32"), ("tensors", "float32"), ("tensors", "bfloat16"))[rng.integers(3)]
    is_plain = is_drift(_nowcasters()[name])
    config = _Config(
        nowcaster=name,
        layout=layout,
        dtype=dtype,
        history_dtype="bfloat16" if layout == "tensors" and dtype == "float32" and rng.random() < 0.4 else None,
        has_average=not is_plain and dtype == "float32" and rng.random() < 0.3,
        has_adam=rng.random() < 0.08,
    )
    model, tally, failures = _Model(config), dict.fromkeys(_COUNTS, 0) | {"steps": 0, "adopted": 0}, list[str]()
    params: Any = {name: rng.normal(0, 0.5, shape).astype(dtype) for name, shape in _LAYOUTS[layout].items()}
    state: Any = _init(config, params)
    settings = _draw_settings(rng, layout)
    first_params = params
    for segment in range(rng.integers(1, 5)):
        if segment > 0:
            change = rng.choice(["nothing", "settings", "count", "nowcaster"], p=[0.2, 0.5, 0.1, 0.2])
            if change == "settings":
                settings = _draw_settings(rng, layout)
            elif change == "count":
                # Some steps before the end of all counting.
                shift = _MAX_COUNT - int(rng.integers(2 * _SEGMENT)) - model.count
                state = model.shift(state, shift)
            elif change == "nowcaster":
                config = config._replace(nowcaster=_another(rng, config.nowcaster))
                model.config = config
        inputs = _draw_inputs(rng, config, first_params)
        params, state, seen = jax.device_get(_program(config)(params, state, settings, inputs))
        for step in range(_SEGMENT):
            now = jax.tree.map(lambda leaf, step=step: leaf[step], (seen, inputs))
            failures += [
                f"step {model.count}: {failure}; {tuple(config)}, {_describe(settings)}"
                for failure in model.step(settings, *now)
            ]
            if failures:
                return Verdict(tally, tuple(failures))
        tally["steps"] += _SEGMENT
    for key in _COUNTS:
        if key != "num_snapshots":
            tally[key] = model.counts[key]
    return Verdict(tally | {"adopted": model.num_adopted}, ())


def _draw_settings(rng: np.random.Generator, layout: str) -> _Settings:
    is_last = rng.random() < (0.7 if layout == "points" else 0.9)
    start = int(rng.choice([0, 0, 0, 3, 10]))
    return _Settings(
        snapshot_every=np.int32(rng.choice([1, 1, 2, 2, 3, 5, 9])),
        start=np.int32(start),
        stop=np.int32(start + rng.integers(1, 40) if rng.random() < 0.15 else _MAX_COUNT),
        average=np.float32(rng.choice([0.0, 0.5, 0.9])),
        horizons=rng.choice(_HORIZONS, _TABLE).astype(np.float32),
        scales=rng.choice(_SCALES, _TABLE).astype(np.float32),
        factor=np.float32(1.0 if is_last else rng.choice([1.0, 0.9, 0.5, 0.0, -1.0, 3.0])),
        limit=np.float32(np.inf if is_last else 10.0 ** rng.uniform(-3, 0)),
    )


def _draw_inputs(rng: np.random.Generator, config: _Config, first_params: Any) -> _Inputs:
    edit, updates, edits = np.zeros(_SEGMENT, np.int32), {}, {}
    size = 10.0 ** rng.uniform(-3, -0.5)
    kind = str(rng.choice(["none", "far", "near", "back"], p=[0.6, 0.15, 0.1, 0.15]))
    edit[rng.integers(_SEGMENT)] = {"none": 0, "far": 1, "near": 1, "back": 2}[kind]
    broken = str(rng.choice(list(_LAYOUTS[config.layout])[:2])) if rng.random() < 0.06 else None
    for name, shape in _LAYOUTS[config.layout].items():
        # A direction with noise; some leaves stay, now and then or for all the time.
        drawn = size * (rng.normal(size=shape) + rng.normal(size=(_SEGMENT, *shape)))
        drawn[rng.random(_SEGMENT) < rng.choice([0.0, 0.3, 1.0], p=[0.7, 0.2, 0.1])] = 0
        if name == broken:
            drawn[rng.integers(_SEGMENT), ...] = np.nan
        updates[name] = drawn.astype(config.dtype)
        by = {"far": 1e3, "near": 1e-4, "back": first_params[name], "none": 0.0}[kind]
        edits[name] = np.broadcast_to(by, drawn.shape).astype(config.dtype)
    return _Inputs(updates, edit, edits)


def _another(rng: np.random.Generator, name: str) -> str:
    """The name of a nowcaster whose history is of the same kind."""

    def kind(nowcaster: Any) -> Any:
        return ("drift", nowcaster.num_means) if is_drift(nowcaster) else nowcaster.context

    all_of_them = _nowcasters()
    return str(rng.choice([other for other in all_of_them if kind(all_of_them[other]) == kind(all_of_them[name])]))


def _takes_schedule(name: str) -> bool:
    """Whether the horizon of a nowcaster is a schedule here, and not its own."""
    return name in ("ahead-2", "ahead-5", "wild-6", "linear", "adaptive-linear")


@functools.cache
def _program(config: _Config) -> Any:
    nowcaster = _nowcasters()[config.nowcaster]

    def look_up(table: jax.Array) -> Any:
        return lambda index: table[jnp.clip(index, 0, _TABLE - 1)]

    @jax.jit
    def run(params: Any, state: Any, settings: _Settings, inputs: _Inputs) -> Any:
        tx: Any = wnn_jax.nowcast(
            nowcaster,
            snapshot_every=settings.snapshot_every,
            start=settings.start,
            stop=settings.stop,
            average=settings.average if config.has_average else None,
            horizon=look_up(settings.horizons) if _takes_schedule(config.nowcaster) else None,
            scale=look_up(settings.scales),
            history_dtype=config.history_dtype,
        )
        after: Any = (
            optax.adam(0.01)
            if config.has_adam
            else optax.chain(optax.scale(settings.factor), optax.clip(settings.limit))
        )

        def step(carry: Any, inputs: _Inputs) -> Any:
            params, state, after_state = carry
            params = jax.tree.map(
                lambda old, by: jnp.where(inputs.edit == 2, by, jnp.where(inputs.edit == 1, old + by, old)),
                params,
                inputs.edits,
            )
            updates, state = tx.update(inputs.updates, state, params)
            seen = _Seen(params, updates, {name: getattr(state, name) for name in _COUNTS})
            updates, after_state = after.update(updates, after_state, params)
            return (optax.apply_updates(params, updates), state, after_state), seen

        (params, *state), seen = jax.lax.scan(step, (params, *state), inputs)
        return params, tuple(state), seen

    return run


def _init(config: _Config, params: Any) -> Any:
    """The states of `nowcast` and of what comes after it."""
    average = 0.5 if config.has_average else None
    nowcaster = _nowcasters()[config.nowcaster]
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=1, average=average, history_dtype=config.history_dtype)
    after: Any = optax.adam(0.01) if config.has_adam else optax.chain(optax.scale(1.0), optax.clip(1.0))
    arrays = jax.tree.map(jnp.asarray, params)
    return tx.init(arrays), after.init(arrays)


class _Landing(NamedTuple):
    """Where a jump should lead, in float64.

    Attributes:
      params: the parameters.
      tolerance: of each weight.
      is_accepted: whether all is finite; `None` where rounding decides.
      num_cut: the least and the greatest number of weights that are held back.
    """

    params: Any
    tolerance: Any
    is_accepted: bool | None
    num_cut: tuple[int, int]


@dataclasses.dataclass
class _Model:
    """A training as the documentation of `nowcast` and of `NowcastState` has it."""

    config: _Config
    count: int = 0
    snapshots: list[Any] = dataclasses.field(default_factory=list[Any])
    num_visits: int = 0
    last_snapshot: int = 0
    last_every: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    left: Any = None
    before: Any = None
    mean: Any = None
    anchor: Any = None
    means: Any = None
    num_adopted: int = 0

    def shift(self, state: Any, by: int) -> Any:
        """Has the training be so many steps further on."""
        nowcast_state, after_state = state
        self.count += by
        self.last_snapshot += by
        nowcast_state = nowcast_state._replace(
            count=np.int32(nowcast_state.count + by), last_snapshot=np.int32(nowcast_state.last_snapshot + by)
        )
        return nowcast_state, after_state

    def step(self, settings: _Settings, seen: _Seen, inputs: _Inputs) -> list[str]:
        """Takes a step, and says what was different."""
        params, updates = seen.params, inputs.updates
        counts, failures = dict(self.counts), list[str]()
        is_misplaced = self._is_misplaced(params)
        if is_misplaced is None:
            self.num_adopted += 1
            is_misplaced = bool(seen.counts["num_misplaced"] > counts["num_misplaced"])
        every, has_history = int(settings.snapshot_every), self._length() > 0
        is_due = (self.count % every == every - 1) and settings.start <= self.count < min(settings.stop, _MAX_COUNT)
        is_continued = self.last_every == every and self.count - self.last_snapshot == every
        counts["num_misplaced"] += is_misplaced
        counts["num_restarts"] += has_history and bool(is_misplaced or (is_due and not is_continued))
        if is_misplaced or (is_due and not is_continued):
            self.snapshots, self.num_visits = [], 0
        after = _add(params, updates)
        mean_before = self.mean
        if self.config.has_average:
            if self.count == 0 or is_misplaced:
                mean_before = _wide(params)
            share = 1 - float(settings.average)
            self.mean = {name: mean + share * (after[name] - mean) for name, mean in mean_before.items()}
        index = min(counts["num_nowcasts"] + counts["num_rejected"], _TABLE - 1)
        scale, landing = float(settings.scales[index]), None
        if is_due:
            self.last_snapshot, self.last_every = self.count, every
            if is_drift(self._nowcaster):
                landing = self._visit(after, scale, every)
            else:
                horizon = settings.horizons[index] if _takes_schedule(self.config.nowcaster) else None
                landing = self._record(params, after, mean_before, scale, horizon)
        is_accepted = False
        if landing is not None:
            is_accepted = landing.is_accepted
            if is_accepted is None:
                self.num_adopted += 1
                is_accepted = bool(seen.counts["num_nowcasts"] > counts["num_nowcasts"])
            counts["num_nowcasts"] += is_accepted
            counts["num_rejected"] += not is_accepted
            num_cut = int(seen.counts["num_cut"]) - counts["num_cut"]
            if is_accepted and landing.num_cut[0] <= num_cut <= landing.num_cut[1]:
                counts["num_cut"] += num_cut
            if is_drift(self._nowcaster):
                self.num_visits = self.num_visits + 1 if is_accepted else 0
        left = _add(params, seen.updates)
        if self.config.has_average and is_accepted:
            # By as much as the parameters.
            self.mean = {name: mean + (_wide(left)[name] - after[name]) for name, mean in self.mean.items()}
        if landing is None or not is_accepted or scale == 0:
            failures += [
                f"{name}: the update is another one, and there is no jump"
                for name in updates
                if updates[name].tobytes() != seen.updates[name].tobytes()
            ]
        else:
            for name, leaf in _wide(left).items():
                is_off = np.abs(leaf - landing.params[name]) > landing.tolerance[name]
                if is_off.any():
                    own, expected, tolerance, found = (
                        float(values[is_off][0])
                        for values in (after[name], landing.params[name], landing.tolerance[name], leaf)
                    )
                    failures.append(f"{name}: a jump from {own} to {found}, not {expected}, within {tolerance:.3g}")
        if is_due and is_drift(self._nowcaster):
            self.anchor = _wide(left)
        counts["num_snapshots"] = self._length()
        failures += [
            f"{name} is {int(seen.counts[name])} instead of {count}"
            for name, count in counts.items()
            if int(seen.counts[name]) != count
        ]
        self.counts, self.before, self.left = counts, params, left
        self.count = min(self.count + 1, _MAX_COUNT)
        return failures

    @property
    def _nowcaster(self) -> Any:
        return _nowcasters()[self.config.nowcaster]

    def _length(self) -> int:
        return self.num_visits if is_drift(self._nowcaster) else len(self.snapshots)

    def _is_misplaced(self, params: Any) -> bool | None:
        """Whether the parameters are not where the last update led, or `None` where that is hard to say."""
        if self.left is None:
            return False
        found, left, before = (
            {name: leaf for name, leaf in _wide(tree).items() if leaf.size and np.isfinite(leaf).all()}
            for tree in (params, self.left, self.before)
        )
        if found.keys() - left.keys():
            return True
        distances = [np.abs(found[name] - left[name]).ravel() for name in found.keys() & left.keys()]
        lengths = [np.abs(left[name] - before[name]).ravel() for name in left.keys() & before.keys()]
        distance, length = (float(np.linalg.norm(np.concatenate([*some, [0.0]]))) for some in (distances, lengths))
        if distance == 0:
            return False
        largest = max(float(np.abs(leaf).max()) for leaf in left.values())
        if self.config.layout == "points":
            if distance < 0.24 * length:
                return False
            return True if distance > 0.26 * length + 1e-5 * largest else None
        is_far = min(float(some.min()) for some in distances) > 30 * (length + largest)
        return True if is_far else None

    def _record(self, params: Any, after: Any, mean_before: Any, scale: float, horizon: Any) -> _Landing | None:
        """Takes a snapshot, or jumps and begins another window."""
        has_average = self.config.has_average
        self.snapshots.append(_narrow(self.mean) if has_average else after)
        if len(self.snapshots) < self._nowcaster.context:
            return None
        window, self.snapshots = self._as_kept(self.snapshots), []
        if horizon is not None:
            horizon = np.int32(max(round(float(np.nan_to_num(horizon, nan=1.0))), 1))
        forecast = _wide(_forecast(self.config.nowcaster)(window, horizon))
        wide = [_wide(snapshot) for snapshot in window]
        # A window of one snapshot has no range but that of the step.
        ranged = wide if len(wide) > 1 else [*wide, _wide(mean_before if has_average else params)]
        horizon = int(getattr(self._nowcaster, "default_horizon", 5) if horizon is None else horizon)
        landed, tolerance = {}, {}
        least_cut = most_cut = 0
        is_accepted: bool | None = True
        exact = float(jnp.finfo(jnp.float32).eps)
        for name, own in _wide(after).items():
            last, predicted = wide[-1][name], forecast[name]
            extremes = np.stack([snapshot[name] for snapshot in ranged])
            reach = horizon * (extremes.max(axis=0) - extremes.min(axis=0))
            is_frozen = np.all(extremes == extremes[0], axis=0)
            move = np.where(is_frozen, 0, scale * np.clip(predicted - last, -reach, reach))
            landed[name] = own + move
            # Of a forecast far ahead rounding is as much more; running means have some of every step.
            rounding = (1 + horizon) * (512 if has_average else 64) * exact * (np.abs(last) + np.abs(own))
            share = 2**-5 if self.config.history_dtype else 2e-3
            slack = np.minimum(share * reach + rounding, 2 * reach + 64 * exact * np.abs(last))
            of_dtype = 8 * float(jnp.finfo(self.config.dtype).eps)
            tolerance[name] = abs(scale) * slack + of_dtype * (
                np.abs(own) + np.abs(landed[name]) + np.abs(params[name])
            )
            beyond = np.abs(predicted - last) - reach
            least_cut += int((~is_frozen & (beyond > slack)).sum())
            most_cut += int(((~is_frozen | has_average) & (beyond > -slack)).sum())
            # Rounding decides whether a mean that comes to rest has moved.
            has_moved = reach > (horizon * rounding if has_average else 0)
            is_bad = ~(np.isfinite(predicted) & np.isfinite(landed[name]))
            if (is_bad & (has_moved | np.isnan(reach))).any():
                is_accepted = False
            elif is_accepted and has_average and (is_bad & ~has_moved).any():
                is_accepted = None
        return _Landing(landed, tolerance, is_accepted, (least_cut if scale else 0, most_cut))

    def _as_kept(self, window: list[Any]) -> list[Any]:
        """A window of which the snapshots between the first and the last are kept as differences from the first."""
        dtype = self.config.history_dtype
        if dtype is None or len(window) < 3:
            return window
        first, *between, last = window
        kept = [
            {
                name: first[name] + (leaf - first[name]).astype(dtype).astype(leaf.dtype)
                for name, leaf in snapshot.items()
            }
            for snapshot in between
        ]
        return [first, *kept, last]

    def _visit(self, after: Any, scale: float, every: int) -> _Landing | None:
        """Remembers where the parameters are, or goes on from there."""
        wide, nowcaster = _wide(after), self._nowcaster
        if self.num_visits == 0:
            self.num_visits = 1
            self.means = [{name: np.zeros_like(leaf) for name, leaf in wide.items()}] * nowcaster.num_means
            return None
        step = self.num_visits * every
        displacement = {name: leaf - self.anchor[name] for name, leaf in wide.items()}
        self.means = [
            {
                name: _rounded(
                    mean[name] + every / memory * (displacement[name] - mean[name]), self.config.history_dtype
                )
                for name in wide
            }
            for mean, memory in zip(self.means, nowcaster.memories(step, every), strict=True)
        ]
        motion = (tuple(_narrow(mean) for mean in self.means), _narrow(displacement), after, np.int32(step), every)
        jump = _wide(_drift(self.config.nowcaster)(*motion))
        landed, tolerance, num_cut = {}, {}, [0, 0]
        for name, own in wide.items():
            length, limit = (
                np.linalg.norm(jump[name]),
                _MAX_GAIN * max(np.linalg.norm(mean[name]) for mean in self.means),
            )
            num_cut[0] += own.size * int(length > 1.01 * limit + 1e-9)
            num_cut[1] += own.size * int(length > 0.99 * limit)
            move = scale * jump[name] * (limit / length if length > limit else 1)
            landed[name] = own + move
            share = 2**-4 if self.config.history_dtype else 5e-3
            of_dtype = 8 * float(jnp.finfo(self.config.dtype).eps)
            tolerance[name] = share * np.linalg.norm(move) + of_dtype * (np.abs(own) + np.abs(landed[name])) + 1e-9
        is_accepted = all(np.isfinite(leaf).all() for leaf in landed.values())
        return _Landing(landed, tolerance, is_accepted, (num_cut[0], num_cut[1]))


@functools.cache
def _forecast(name: str) -> Any:
    nowcaster = _nowcasters()[name]

    @jax.jit
    def forecast(window: Any, horizon: Any) -> Any:
        return nowcaster(window, wnn_jax.default_roles(window[0]), horizon)

    return forecast


@functools.cache
def _drift(name: str) -> Any:
    nowcaster = _nowcasters()[name]

    @jax.jit
    def jump(means: Any, displacement: Any, params: Any, step: Any, every: Any) -> Any:
        motion = wnn_jax.Motion(means, displacement, params, step, every, None)
        return nowcaster(motion, wnn_jax.default_roles(params))

    return jump


def _add(params: Any, updates: Any) -> Any:
    with np.errstate(all="ignore"):
        return {name: (leaf + updates[name]).astype(leaf.dtype) for name, leaf in params.items()}


def _wide(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def _narrow(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float32) for name, leaf in tree.items()}


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    return values.astype(np.float32).astype(dtype or np.float32).astype(np.float64)


def _describe(settings: _Settings) -> str:
    return ", ".join(f"{name}={np.asarray(value).tolist()}" for name, value in settings._asdict().items())


PART = Part(num_cases=10_000, num_tested=2, check=check)
