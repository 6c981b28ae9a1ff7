"""A plain model of `wnn_jax.nowcast`, written from its documentation.

The model is given the parameters of each step, so that rounding does not add up. It checks where the step leads and the
counts of `wnn_jax.metrics`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wnn_jax
from tests import reference
from tests.properties.strategies import Tree
from wnn_jax._orthogonal import COEFFICIENTS
from wnn_jax.nowcasters import Drift

COUNTS = ("num_nowcasts", "num_rejected", "num_cut", "num_restarts", "num_misplaced")
TABLE_SIZE = 16
NEVER = 2**31 - 1
_LEAST_MEMORY = 11
_EPS = float(np.finfo(np.float32).eps)


class Settings(NamedTuple):
    """Arguments of `nowcast` that may change during a training run, as arrays; schedules are tables by the index."""

    snapshot_every: Any
    start: Any
    stop: Any
    horizons: Any
    scales: Any


class Landing(NamedTuple):
    """Where a jump leads, how far each weight may be off, and the least and greatest number of weights held back."""

    params: Tree
    tolerance: Tree
    num_cut: tuple[int, int]


@functools.cache
def nowcaster_of(name: str) -> Any:
    """Make a rule by its name in wnn_jax, a rule `KIND-CONTEXT` that only tests need, or a drift beyond its bound."""

    def ahead(history: Any, role: str, horizon: Any) -> Any:
        horizon = 5 if horizon is None else horizon
        return history[-1] + 0.4 * horizon * (history[-1] - history[0]) + 0.01

    def wild(history: Any, role: str, horizon: Any) -> Any:
        # Not finite where a weight is above 1, and beyond any bound elsewhere.
        return jnp.where(history[-1] > 1, jnp.nan, history[-1] + 50 * (history[-1] - history[0]))

    if name == "far-drift":
        return Drift(spectral=False, gain=1e3, max_gain=130.0, reach=1e9)
    kind, _, context = name.partition("-")
    if context.isdigit():
        return wnn_jax.leafwise({"ahead": ahead, "wild": wild}[kind], context=int(context))
    return wnn_jax.load(name)


@dataclasses.dataclass
class Model:
    """A training run with `nowcast`, as its documentation describes it."""

    nowcaster: str
    layout: str
    count: int = 0
    history: list[Tree] = dataclasses.field(default_factory=list[Tree])
    last_visit: tuple[int, int] | None = None
    last_nowcast: int = -1
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    before: Tree | None = None
    left: Tree | None = None
    mean: Tree = dataclasses.field(default_factory=Tree)

    def check_step(self, settings: Settings, params: Tree, updates: Tree, actual: Tree, metrics: Any) -> None:
        """Take a step from `params`, for which `nowcast` made `actual` from `updates`, and compare."""
        every, counts = int(settings.snapshot_every), self.counts
        is_misplaced = self._is_misplaced(params)
        if is_misplaced is None:
            is_misplaced = bool(metrics["num_misplaced"] > counts["num_misplaced"])
        is_due = self.count % every == every - 1 and settings.start <= self.count < settings.stop
        if is_misplaced or (is_due and self.last_visit != (self.count - every, every)):
            counts["num_restarts"] += len(self.history) > 0
            self.history = []
        counts["num_misplaced"] += is_misplaced
        index = min(counts["num_nowcasts"] + counts["num_rejected"], TABLE_SIZE - 1)
        scale, horizon = float(settings.scales[index]), float(np.nan_to_num(settings.horizons[index], nan=1.0))
        after, left, landing, is_accepted = _add(params, updates), _add(params, actual), None, False
        is_drift = isinstance(nowcaster_of(self.nowcaster), Drift)
        if is_due:
            self.last_visit = self.count, every
            horizon = max(round(horizon), 1)
            landing = self._visit(after, scale, every) if is_drift else self._record(after, params, scale, horizon)
        if landing is not None:
            is_accepted = all(np.isfinite(leaf).all() for leaf in landing.params.values())
            counts["num_nowcasts" if is_accepted else "num_rejected"] += 1
        if landing is not None and is_accepted:
            num_cut = int(metrics["num_cut"]) - counts["num_cut"]
            assert landing.num_cut[0] <= num_cut <= landing.num_cut[1], f"{num_cut} cut, not {landing.num_cut}"
            counts["num_cut"] += num_cut
            self.last_nowcast = self.count
        if landing is not None and is_accepted and scale != 0:
            for name, leaf in _wide(left).items():
                is_close = np.abs(leaf - landing.params[name]) <= landing.tolerance[name]
                assert is_close.all(), f"{name}: from {after[name]} to {leaf}, not {landing.params[name]}"
        else:
            for name, update in updates.items():
                assert update.tobytes() == actual[name].tobytes(), f"{name}: another update, and there is no jump"
        if is_drift and is_due:
            # A rejected jump is not finite.
            self.history = [*self.history, _wide(left)] if landing is None or is_accepted else []
        self.before, self.left, self.count = params, left, self.count + 1
        expected = {**counts, "steps_since_nowcast": self.count - self.last_nowcast - 1}
        assert {name: int(metrics[name]) for name in expected} == expected

    def _is_misplaced(self, params: Tree) -> bool | None:
        """Tell whether the parameters are not where the last update led, or return `None` if this is hard to tell."""
        if self.left is None or self.before is None:
            return False
        actual, left, before = (
            {name: leaf for name, leaf in _wide(tree).items() if leaf.size and np.isfinite(leaf).all()}
            for tree in (params, self.left, self.before)
        )
        if actual.keys() - left.keys():
            return True
        distance, length = (
            float(np.sqrt(sum(((one[name] - other[name]) ** 2).sum() for name in one.keys() & other.keys())))
            for one, other in ((actual, left), (left, before))
        )
        if distance == 0:
            return False
        largest = max(float(np.abs(leaf).max()) for leaf in left.values())
        if self.layout != "points":  # Only single weights are checked exactly.
            least = min(float(np.abs(actual[name] - left[name]).min()) for name in actual.keys() & left.keys())
            return True if least > 30 * (length + largest) else None
        if 0.24 * length <= distance <= 0.26 * length + 1e-5 * largest:
            return None
        return distance > 0.25 * length

    def _record(self, after: Tree, params: Tree, scale: float, horizon: int) -> Landing | None:
        """Take a snapshot, or jump and begin another window."""
        self.history.append(after)
        if len(self.history) < nowcaster_of(self.nowcaster).context:
            return None
        window, self.history = self.history, []
        forecast, snapshots = _wide(_forecast(self.nowcaster)(window, np.int32(horizon))), [*map(_wide, window)]
        # The range of a window of one snapshot is the range of the step.
        ranged = snapshots if len(snapshots) > 1 else [*snapshots, _wide(params)]
        landed, tolerance, num_cut = Tree(), Tree(), [0, 0]
        for name, last in snapshots[-1].items():
            extremes = np.stack([snapshot[name] for snapshot in ranged])
            reach, is_frozen = horizon * np.ptp(extremes, axis=0), np.all(extremes == extremes[0], axis=0)
            move = scale * np.clip(forecast[name] - last, -reach, reach)
            # Even at a scale of 0, a forecast that is not finite is rejected.
            landed[name] = last + np.where(is_frozen, 0, np.where(np.isfinite(forecast[name]), move, np.nan))
            # Rounding grows with the horizon.
            rounding = (1 + horizon) * 64 * _EPS * 2 * np.abs(last)
            slack = np.minimum(2e-3 * reach + rounding, 2 * reach + 64 * _EPS * np.abs(last))
            size = np.abs(last) + np.abs(landed[name]) + np.abs(params[name].astype(float))
            tolerance[name] = abs(scale) * slack + 8 * float(jnp.finfo(after[name].dtype).eps) * size
            beyond = np.where(is_frozen, -np.inf, np.abs(forecast[name] - last) - reach)
            num_cut[0] += int((beyond > slack).sum()) * (scale != 0)
            num_cut[1] += int((beyond > -slack).sum())
        return Landing(landed, tolerance, (num_cut[0], num_cut[1]))

    def _visit(self, after: Tree, scale: float, every: int) -> Landing | None:
        """Go on along the running mean of the displacement, or begin to remember where the parameters are."""
        drift, own = nowcaster_of(self.nowcaster), _wide(after)
        if not self.history:
            self.mean = {name: np.zeros_like(leaf) for name, leaf in own.items()}
            return None
        memory = drift.memory * len(self.history) * every + _LEAST_MEMORY + every
        moved = {name: leaf - self.history[-1][name] for name, leaf in own.items()}
        mean = {name: old + every / memory * (moved[name] - old) for name, old in self.mean.items()}
        self.mean = {name: leaf.astype(np.float32).astype(float) for name, leaf in mean.items()}
        norms = {name: float(np.linalg.norm(leaf)) for name, leaf in self.mean.items()}
        moving = np.concatenate([np.zeros(1), *(own[name].ravel() for name, norm in norms.items() if norm != 0)])
        path = np.linalg.norm(list(norms.values())) * memory / every
        reach = drift.reach * np.linalg.norm(moving) / np.maximum(path, 1e-30)
        gain = np.minimum(np.minimum(drift.gain * memory, drift.max_gain), reach)
        landed, tolerance = Tree(), Tree()
        for name, leaf in own.items():
            direction = self.mean[name]
            if drift.spectral and direction.ndim == 2 and norms[name] > 0:
                direction = reference.orthogonalize(direction, COEFFICIENTS)
            move = scale * gain * direction
            landed[name] = leaf + move
            rounding = 8 * float(jnp.finfo(after[name].dtype).eps) * (np.abs(leaf) + np.abs(landed[name]))
            tolerance[name] = 5e-3 * np.linalg.norm(move) + rounding + 1e-9
        return Landing(landed, tolerance, (0, 0))


def _wide(tree: Any) -> Tree:
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def _add(params: Tree, updates: Tree) -> Tree:
    return {name: (leaf + updates[name]).astype(leaf.dtype) for name, leaf in params.items()}


@functools.cache
def _forecast(name: str) -> Any:
    nowcaster = nowcaster_of(name)
    return jax.jit(lambda window, horizon: nowcaster(window, wnn_jax.default_roles(window[0]), horizon))
