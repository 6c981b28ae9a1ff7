"""A plain model of `wnn_jax.nowcast`, written from its documentation.

The model is told where the parameters are at each step, so that rounding does not add up. It checks where the step
leads and what `wnn_jax.metrics` counts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wnn_jax
from tests import reference
from wnn_jax._orthogonal import COEFFICIENTS
from wnn_jax.nowcasters import Drift

Tree = dict[str, np.ndarray]

COUNTS = ("num_nowcasts", "num_rejected", "num_cut", "num_restarts", "num_misplaced")
TABLE_SIZE = 16
NEVER = 2**31 - 1
_MAX_GAIN = 100.0
_LEAST_MEMORY = 11
_EPS = float(np.finfo(np.float32).eps)


class Settings(NamedTuple):
    """Arguments of `nowcast` that may change during a training run, as arrays; schedules are tables by the index."""

    snapshot_every: Any
    start: Any
    stop: Any
    average: Any
    horizons: Any
    scales: Any


class Landing(NamedTuple):
    """Where a jump leads.

    Attributes:
      params: the parameters, in float64.
      tolerance: of each weight.
      is_accepted: whether all is finite; `None` where rounding decides.
      num_cut: the least and the greatest number of weights that the bound holds back.
    """

    params: Tree
    tolerance: Tree
    is_accepted: bool | None
    num_cut: tuple[int, int]


@functools.cache
def nowcaster_of(name: str) -> Any:
    """A rule by its name in wnn_jax, or `KIND-CONTEXT` of a rule that only tests need, or a drift beyond its bound."""

    def ahead(history: Any, role: str, horizon: Any) -> Any:
        return history[-1] + 0.4 * (5 if horizon is None else horizon) * (history[-1] - history[0]) + 0.01

    def wild(history: Any, role: str, horizon: Any) -> Any:
        # Not finite where a weight is above 1, and beyond any bound elsewhere.
        return jnp.where(history[-1] > 1, jnp.nan, history[-1] + 50 * (history[-1] - history[0]))

    if name == "far-drift":
        return Drift(spectral=False, gain=1e3, max_gain=130.0, reach=1e9)
    kind, _, context = name.partition("-")
    if context.isdigit():
        return wnn_jax.leafwise({"ahead": ahead, "wild": wild}[kind], context=int(context))
    return wnn_jax.load(name)


def takes_schedule(name: str) -> bool:
    """Whether the tests give this nowcaster a schedule of horizons, rather than leave the horizon to it."""
    return name in ("ahead-2", "ahead-5", "wild-6", "linear")


@dataclasses.dataclass
class Model:
    """A training run with `nowcast`, as its documentation describes it."""

    nowcaster: str
    layout: str
    history_dtype: str | None
    has_average: bool
    count: int = 0
    history: list[Tree] = dataclasses.field(default_factory=list[Tree])
    last_visit: tuple[int, int] | None = None
    last_nowcast: int = -1
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    before: Tree | None = None
    left: Tree | None = None
    mean: Any = None

    def check_step(self, settings: Settings, params: Tree, updates: Tree, actual: Tree, metrics: Any) -> None:
        """Takes a step.

        Args:
          settings: of `nowcast`.
          params: before the step.
          updates: what `nowcast` was given.
          actual: what `nowcast` returned.
          metrics: what `wnn_jax.metrics` says after the step.

        Raises:
          AssertionError: if the step leads elsewhere, or counts something else.
        """
        every, counts = int(settings.snapshot_every), self.counts
        is_misplaced = self._is_misplaced(params)
        if is_misplaced is None:
            is_misplaced = bool(metrics["num_misplaced"] > counts["num_misplaced"])
        is_due = self.count % every == every - 1 and settings.start <= self.count < settings.stop
        if is_misplaced or (is_due and self.last_visit != (self.count - every, every)):
            counts["num_restarts"] += len(self.history) > 0
            self.history = []
        counts["num_misplaced"] += is_misplaced
        after, origin = _add(params, updates), wide(params)
        if self.has_average:
            origin = wide(params) if self.count == 0 or is_misplaced else self.mean
            share = 1 - float(settings.average)
            self.mean = {name: mean + share * (after[name] - mean) for name, mean in origin.items()}
        index = min(counts["num_nowcasts"] + counts["num_rejected"], TABLE_SIZE - 1)
        scale, horizon, landing = float(settings.scales[index]), None, None
        if takes_schedule(self.nowcaster):
            horizon = np.int32(max(round(float(np.nan_to_num(settings.horizons[index], nan=1.0))), 1))
        is_drift = isinstance(nowcaster_of(self.nowcaster), Drift)
        if is_due:
            self.last_visit = self.count, every
            landing = self._visit(after, scale, every) if is_drift else self._record(after, origin, scale, horizon)
        is_accepted = landing is not None and landing.is_accepted
        if landing is not None:
            if is_accepted is None:
                is_accepted = bool(metrics["num_nowcasts"] > counts["num_nowcasts"])
            counts["num_nowcasts"] += bool(is_accepted)
            counts["num_rejected"] += not is_accepted
            if is_accepted:
                num_cut = int(metrics["num_cut"]) - counts["num_cut"]
                assert landing.num_cut[0] <= num_cut <= landing.num_cut[1], f"{num_cut} cut, not {landing.num_cut}"
                counts["num_cut"] += num_cut
                self.last_nowcast = self.count
        left = _add(params, actual)
        if landing is None or not is_accepted or scale == 0:
            for name, update in updates.items():
                assert update.tobytes() == actual[name].tobytes(), f"{name}: another update, and there is no jump"
        else:
            for name, leaf in wide(left).items():
                error = np.abs(leaf - landing.params[name]) / landing.tolerance[name]
                assert error.max(initial=0) <= 1, f"{name}: from {after[name]} to {leaf}, not {landing.params[name]}"
        if self.has_average and is_accepted:
            self.mean = {name: mean + (wide(left)[name] - after[name]) for name, mean in self.mean.items()}
        if is_drift and is_due:
            # What a rejected jump was made of is not finite.
            self.history = [*self.history, wide(left)] if landing is None or is_accepted else []
        self.before, self.left, self.count = params, left, self.count + 1
        expected = {**counts, "steps_since_nowcast": self.count - self.last_nowcast - 1}
        assert {name: int(metrics[name]) for name in expected} == expected

    def _is_misplaced(self, params: Tree) -> bool | None:
        """Whether the parameters are not where the last update led, or `None` where that is hard to say."""
        if self.left is None or self.before is None:
            return False
        found, left, before = (
            {name: leaf for name, leaf in wide(tree).items() if leaf.size and np.isfinite(leaf).all()}
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
        if self.layout == "points":
            # All single weights are looked at, exactly.
            if distance < 0.24 * length:
                return False
            return True if distance > 0.26 * length + 1e-5 * largest else None
        return True if min(float(some.min()) for some in distances) > 30 * (length + largest) else None

    def _record(self, after: Tree, origin: Any, scale: float, horizon: Any) -> Landing | None:
        """Takes a snapshot, or jumps and begins another window."""
        nowcaster = nowcaster_of(self.nowcaster)
        self.history.append(_narrow(self.mean) if self.has_average else after)
        if len(self.history) < nowcaster.context:
            return None
        window, self.history = self._as_kept(self.history), []
        forecast = wide(_forecast(self.nowcaster)(window, horizon))
        horizon = int(getattr(nowcaster, "default_horizon", 5) if horizon is None else horizon)
        snapshots = [wide(snapshot) for snapshot in window]
        # A window of one snapshot has no range but that of the step.
        ranged = snapshots if len(snapshots) > 1 else [*snapshots, origin]
        landed, tolerance, num_cut, is_accepted = Tree(), Tree(), [0, 0], True
        for name, own in wide(after).items():
            last, predicted = snapshots[-1][name], forecast[name]
            extremes = np.stack([snapshot[name] for snapshot in ranged])
            reach, is_frozen = horizon * np.ptp(extremes, axis=0), np.all(extremes == extremes[0], axis=0)
            landed[name] = own + np.where(is_frozen, 0, scale * np.clip(predicted - last, -reach, reach))
            # In a forecast far ahead rounding is as much larger, and a running mean has some of every step.
            rounding = (1 + horizon) * (512 if self.has_average else 64) * _EPS * (np.abs(last) + np.abs(own))
            slack = (2**-5 if self.history_dtype else 2e-3) * reach + rounding
            slack = np.minimum(slack, 2 * reach + 64 * _EPS * np.abs(last))
            of_dtype = 8 * float(jnp.finfo(after[name].dtype).eps)
            tolerance[name] = abs(scale) * slack + of_dtype * (
                np.abs(own) + np.abs(landed[name]) + np.abs(origin[name]) + 1e-30
            )
            beyond = np.abs(predicted - last) - reach
            num_cut[0] += int((~is_frozen & (beyond > slack)).sum()) * (scale != 0)
            num_cut[1] += int(((~is_frozen | self.has_average) & (beyond > -slack)).sum())
            # Rounding decides whether a mean that comes to rest has moved.
            has_moved = (reach > (horizon * rounding if self.has_average else 0)) | np.isnan(reach)
            is_bad = ~(np.isfinite(predicted) & np.isfinite(landed[name]))
            if (is_bad & has_moved).any():
                is_accepted = False
            elif is_accepted and self.has_average and is_bad.any():
                is_accepted = None
        return Landing(landed, tolerance, is_accepted, (num_cut[0], num_cut[1]))

    def _as_kept(self, window: list[Tree]) -> list[Tree]:
        """The window, with all but the first and the last snapshot kept as differences from the first."""
        if self.history_dtype is None or len(window) < 3:
            return window
        first, *between, last = window

        def kept(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return old + (new - old).astype(self.history_dtype).astype(new.dtype)

        return [first, *({name: kept(first[name], leaf) for name, leaf in tree.items()} for tree in between), last]

    def _visit(self, after: Tree, scale: float, every: int) -> Landing | None:
        """Goes on along the running mean of the displacement, or begins to remember where the parameters are."""
        drift, own = nowcaster_of(self.nowcaster), wide(after)
        if not self.history:
            self.mean = {name: np.zeros_like(leaf) for name, leaf in own.items()}
            return None
        memory = drift.memory * len(self.history) * every + _LEAST_MEMORY + every
        moved = {name: leaf - self.history[-1][name] for name, leaf in own.items()}
        mean = {name: old + every / memory * (moved[name] - old) for name, old in self.mean.items()}
        self.mean = {name: leaf.astype(self.history_dtype or np.float32).astype(float) for name, leaf in mean.items()}
        norms = {name: float(np.linalg.norm(leaf)) for name, leaf in self.mean.items()}
        moving = np.concatenate([np.zeros(1), *(own[name].ravel() for name, norm in norms.items() if norm != 0)])
        path = np.linalg.norm(list(norms.values())) * memory / every
        reach = drift.reach * np.linalg.norm(moving) / np.maximum(path, 1e-30)
        gain = np.minimum(np.minimum(drift.gain * memory, drift.max_gain), reach)
        landed, tolerance, num_cut = Tree(), Tree(), [0, 0]
        for name, leaf in own.items():
            direction = self.mean[name]
            if drift.spectral and direction.ndim == 2 and norms[name] > 0:
                direction = reference.orthogonalize(direction, COEFFICIENTS)
            length = gain * norms[name]
            num_cut[0] += leaf.size * int(length > 1.01 * _MAX_GAIN * norms[name] + 1e-9)
            num_cut[1] += leaf.size * int(length > 0.99 * _MAX_GAIN * norms[name])
            move = scale * min(gain, _MAX_GAIN) * direction
            landed[name] = leaf + move
            of_dtype = 8 * float(jnp.finfo(after[name].dtype).eps)
            share = 2**-4 if self.history_dtype else 5e-3
            tolerance[name] = share * np.linalg.norm(move) + of_dtype * (np.abs(leaf) + np.abs(landed[name])) + 1e-9
        is_accepted = all(np.isfinite(leaf).all() for leaf in landed.values())
        return Landing(landed, tolerance, is_accepted, (num_cut[0], num_cut[1]))


def wide(tree: Any) -> Tree:
    """A tree in float64."""
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def _narrow(tree: Any) -> Tree:
    return {name: np.asarray(leaf, np.float32) for name, leaf in tree.items()}


def _add(params: Tree, updates: Tree) -> Tree:
    return {name: (leaf + updates[name]).astype(leaf.dtype) for name, leaf in params.items()}


@functools.cache
def _forecast(name: str) -> Any:
    nowcaster = nowcaster_of(name)
    return jax.jit(lambda window, horizon: nowcaster(window, wnn_jax.default_roles(window[0]), horizon))
