"""The window: what a nowcaster is, how its snapshots are kept, and how parameters jump to its forecast."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax._checks import check_int
from wnn_jax._guards import Jump, Outcome, Visit, add_counts, check_prediction, no_jump, relative_size
from wnn_jax._roles import ROLES
from wnn_jax._trees import (
    MemoryKind,
    add,
    all_finite,
    apply_updates,
    choose,
    difference,
    fetch,
    following,
    norm,
    put_away,
    wide_dtype,
    write_if,
)

# Default forecast horizon, in snapshots.
DEFAULT_HORIZON = 5
# Float32 has all integers up to this.
_MAX_HORIZON = 2**24

LeafHistory = tuple[jax.Array, ...]
LeafFn = Callable[[LeafHistory, str, Any], jax.Array]


@runtime_checkable
class Nowcaster(Protocol):
    """Forecasts parameters from their own recent history.

    Any object with these two members is a nowcaster, without inheritance. `nowcast` also reads four optional
    attributes:

    - `takes_horizon` (default `True`): whether the nowcaster uses its `horizon`. If not, `nowcast(horizon=...)` is
      refused.
    - `default_horizon` (default 5): how many snapshots ahead it forecasts when `horizon` is `None`. It bounds the
      jumps; see `nowcast`.
    - `snapshot_every`: steps between snapshots, if the user gives none.
    - `check_params(params, roles)`: raises a `ValueError` if the nowcaster cannot forecast such parameters. `nowcast`
      calls it when it initialises its state, so this method may also prepare what depends on shapes.

    Attributes:
      context: how many snapshots a forecast is made from.
    """

    @property
    def context(self) -> int: ...

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any) -> Any:
        """Forecast the parameters.

        Args:
          history: `context` trees like the parameters, evenly spaced, oldest first.
          roles: a tree like the parameters with a role name (see `default_roles`) at each leaf.
          horizon: how many snapshots after the last one to forecast (an int, possibly traced), or `None` for the
            nowcaster's own default.

        Returns:
          The forecast: the same tree, shapes and dtypes. A leaf whose role the nowcaster does not handle keeps its
          value in the last snapshot.
        """
        ...


def check_length(history: Sequence[Any], context: int) -> None:
    """Raise a `ValueError` unless the history has as many snapshots as the nowcaster needs."""
    if len(history) != context:
        raise ValueError(
            f"history has {len(history)} snapshots but this nowcaster has context={context}; "
            f"pass a sequence of {context} parameter trees, oldest first."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _Leafwise:
    """The nowcaster that `leafwise` makes."""

    fn: LeafFn
    context: int
    roles: tuple[str, ...]
    takes_horizon: bool

    def __repr__(self) -> str:
        return short_repr(self, fn=getattr(self.fn, "__qualname__", type(self.fn).__name__))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any) -> Any:
        check_length(history, self.context)

        def predict(role: str, *leaf_history: Any) -> jax.Array:
            arrays = tuple(jnp.asarray(leaf) for leaf in leaf_history)
            return self.fn(arrays, role, horizon).astype(arrays[-1].dtype) if role in self.roles else arrays[-1]

        return jax.tree.map(predict, roles, *history)


def leafwise(fn: LeafFn, *, context: int = 5, roles: Collection[str] = ROLES, takes_horizon: bool = True) -> Nowcaster:
    """Make a nowcaster from a function that forecasts a single leaf.

    Args:
      fn: `fn(leaf_history, role, horizon) -> forecast`. `leaf_history` is a tuple of `context` arrays of the leaf's
        shape and dtype, oldest first. The forecast has the same shape, and is cast to the leaf's dtype.
      context: how many snapshots `fn` needs.
      roles: the roles that `fn` handles. A leaf with any other role comes back unchanged.
      takes_horizon: whether `fn` uses its `horizon` argument.

    Returns:
      A `Nowcaster`.

    Raises:
      ValueError: if `context` is not a positive int, or `roles` has an unknown name.

    Examples:
      Half of the last move, repeated:

      >>> import jax.numpy as jnp
      >>> import wnn_jax
      >>> momentum = wnn_jax.leafwise(lambda h, role, horizon: h[-1] + 0.5 * (h[-1] - h[-2]), context=2)
      >>> momentum([{"w": jnp.array(1.0)}, {"w": jnp.array(2.0)}], {"w": "bias"}, None)["w"].item()
      2.5
    """
    context = check_int("context", context, "the number of snapshots fn needs", minimum=1)
    if unknown := sorted(set(roles) - set(ROLES)):
        raise ValueError(f"roles={unknown} are unknown; choose from {', '.join(ROLES)}.")
    return _Leafwise(fn, context, tuple(roles), takes_horizon)


def short_repr(nowcaster: Nowcaster, params: Any = (), **settings: Any) -> str:
    """Return a nowcaster in one short line: `ClassName(setting='value', 1,234 weights, context=5)`."""
    num_weights = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))
    shown = [f"{name}={value!r}" for name, value in settings.items()]
    name = type(nowcaster).__name__.lstrip("_")
    return f"{name}({', '.join([*shown, f'{num_weights:,} weights', f'context={nowcaster.context}'])})"


def decaying_horizon(num_nowcasts: int, *, first: int = 40, last: int = 1) -> Callable[[Any], jax.Array]:
    """Return a schedule for `nowcast(horizon=...)`: far ahead at the start of a training run, near at its end.

    The square root of the horizon falls linearly from `first` to `last`, and stays there.

    Args:
      num_nowcasts: how many jumps the training run has: its steps divided by `context * snapshot_every`.
      first: the horizon of the first jump, in snapshots.
      last: the horizon of the last jump, in snapshots.

    Returns:
      A function from the jump's index (0 for the first) to an int32 horizon.

    Raises:
      ValueError: if an argument is not an int >= 1.

    Examples:
      >>> import wnn_jax
      >>> schedule = wnn_jax.decaying_horizon(10)
      >>> [int(schedule(index)) for index in range(10)]
      [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """
    num_nowcasts = check_int("num_nowcasts", num_nowcasts, "how many nowcasts the training has", minimum=1)
    first = check_int("first", first, "the horizon of the first nowcast, in snapshots", minimum=1)
    last = check_int("last", last, "the horizon of the last nowcast, in snapshots", minimum=1)
    roots = np.linspace(np.sqrt(first), np.sqrt(last), num_nowcasts)
    horizons = np.round(roots**2).astype(np.int32)
    return lambda index: jnp.asarray(horizons)[jnp.clip(index, 0, num_nowcasts - 1)]


def clip_horizon(horizon: Any, maximum: int = _MAX_HORIZON) -> jax.Array:
    """Round a real scalar from a schedule to an int32 from 1 to `maximum`. NaN becomes 1."""
    horizon = jnp.asarray(horizon)
    if horizon.ndim > 0 or not (jnp.issubdtype(horizon.dtype, jnp.number) and jnp.isrealobj(horizon)):
        raise ValueError(f"horizon is of the type {jax.typeof(horizon)}; an array must be a real scalar.")
    horizon = jnp.round(horizon.astype(jnp.float32))
    return jnp.minimum(jnp.where(horizon >= 1, horizon, 1), maximum).astype(jnp.int32)


class WindowHistory(NamedTuple):
    """The history of a window: all snapshots but the last, oldest first.

    The snapshots are separate trees, not one stacked tree, so that each keeps the parameters' shardings. If they are
    snapshots of a running mean of the parameters, that is `mean`, in at least float32.
    """

    snapshots: tuple[Any, ...]
    mean: Any = None


@dataclasses.dataclass(frozen=True)
class WindowRule:
    """Fill a window with snapshots, jump to the forecast, and begin the next window.

    With an `average`, a decay per step, snapshots are of the running mean. With a `dtype`, snapshots after the first
    are kept as differences from it, in this dtype if it is narrower than the parameter's.
    """

    nowcaster: Nowcaster
    average: float | None = None
    dtype: Any = None
    memory_kind: MemoryKind = None

    def init(self, params: Any) -> WindowHistory:
        """Return an empty window, each array in a buffer of its own so that the state can be donated."""
        mean = None
        if self.average is not None:
            mean = params = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=wide_dtype(param)), params)

        def empty(index: int, param: Any) -> jax.Array:
            dtype = jnp.result_type(param)
            is_narrower = self.dtype is not None and jnp.finfo(dtype).bits > jnp.finfo(self.dtype).bits
            return jnp.zeros_like(param, dtype=self.dtype if index > 0 and is_narrower else dtype)

        snapshots = (jax.tree.map(functools.partial(empty, i), params) for i in range(self.nowcaster.context - 1))
        return WindowHistory(put_away(tuple(snapshots), self.memory_kind), mean)

    def write(self, snapshots: tuple[Any, ...], slot: jax.Array, params: Any) -> tuple[Any, ...]:
        """Return the snapshots with `params` in place of snapshot number `slot` (int32), if there is one."""
        first: Any = ()
        written: list[Any] = []
        for index, snapshot in enumerate(fetch(snapshots, self.memory_kind)):

            def write_leaf(param: jax.Array, old: jax.Array, *first: jax.Array, index: int = index) -> jax.Array:
                new = difference(param, *first).astype(old.dtype) if old.dtype != param.dtype else param
                return jnp.where(slot == index, new, old)

            # Differences are from the new first snapshot: otherwise every step would copy the old one.
            written.append(jax.tree.map(write_leaf, params, snapshot, *first))
            first = first or (written[0],)
        return put_away(tuple(written), self.memory_kind)

    def read(self, snapshots: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the snapshots as trees of the parameters' own dtypes."""

        def restore(first: jax.Array, kept: jax.Array) -> jax.Array:
            return kept if kept.dtype == first.dtype else add(first, kept.astype(wide_dtype(first)))

        snapshots = fetch(snapshots, self.memory_kind)
        return tuple(jax.tree.map(restore, snapshots[0], snapshot) for snapshot in snapshots)

    def update(self, visit: Visit, updates: Any, history: WindowHistory, params: Any, roles: Any) -> Outcome:
        """Record a snapshot, or jump, or change nothing."""
        history = WindowHistory(*history)  # A checkpoint may have turned it into a plain tuple.
        decay = self.average
        if decay is None:
            return self._visit(visit, updates, history, params, roles)
        # The mean begins as the parameters.
        mean = choose(visit.is_first, optax.tree.cast_like(params, history.mean), history.mean)
        after = apply_updates(params, updates)
        steps = jax.tree.map(lambda mean, new: (1 - decay) * (new.astype(mean.dtype) - mean), mean, after)
        outcome = self._visit(visit, steps, history, mean, roles)

        def follow(updates: Any, jumped: Any, steps: Any, params: Any) -> tuple[Any, Jump]:
            moved = jax.tree.map(lambda update, new, old: add(update, new - old), updates, jumped, steps)
            is_accepted = outcome.jump.is_accepted & all_finite(apply_updates(params, moved))
            updates = choose(is_accepted & (visit.scale != 0), moved, updates)
            return updates, choose(is_accepted, outcome.jump, no_jump())

        # The parameters move by as much as the mean jumps. Where they cannot follow, the mean stays with them.
        updates, jump = write_if(
            outcome.is_jump, follow, lambda updates, *_: (updates, no_jump()), updates, outcome.updates, steps, params
        )
        steps = choose(outcome.is_jump & ~jump.is_accepted, steps, outcome.updates)
        history = outcome.history._replace(mean=jax.tree.map(jnp.add, mean, steps))
        return outcome._replace(updates=updates, history=history, jump=jump)

    def _visit(self, visit: Visit, updates: Any, history: WindowHistory, params: Any, roles: Any) -> Outcome:
        is_jump = visit.is_due & (visit.num_snapshots == self.nowcaster.context - 1)
        is_recording = visit.is_due & ~is_jump

        # Both branches compute the parameters after the step: as an operand, they would be a buffer that every step
        # fills.
        @jax.named_scope("record")
        def record(snapshots: tuple[Any, ...], params: Any, updates: Any) -> tuple[Any, ...]:
            slot = jnp.where(is_recording, visit.num_snapshots, -1)
            return self.write(snapshots, slot, apply_updates(params, updates))

        @jax.named_scope("jump")
        def jump(updates: Any, params: Any, snapshots: tuple[Any, ...]) -> tuple[Any, Jump]:
            earlier = self.read(snapshots)
            with jax.named_scope("forecast"):
                forecast = self.nowcaster((*earlier, apply_updates(params, updates)), roles, visit.horizon)
            check_prediction(forecast, params)
            horizon = getattr(self.nowcaster, "default_horizon", DEFAULT_HORIZON)
            horizon = horizon if visit.horizon is None else visit.horizon
            leaves = list(zip(*map(jax.tree.leaves, (forecast, params, updates, *earlier)), strict=True))
            # Recompute for the updates rather than store for the checks: storing would cost a copy of the model.
            made = _check_landings(is_jump, leaves, horizon, visit.scale)
            landings = [_land(*leaf, horizon=horizon, scale=visit.scale) for leaf in leaves]
            jumped = jax.tree.unflatten(jax.tree.structure(params), [landing.update for landing in landings])
            # A jump of no length counts, so that schedules go on, but it must not change a bit.
            return choose(made.is_accepted & (visit.scale != 0), jumped, updates), made

        # Record before the jump: the other order would copy the snapshots.
        snapshots = write_if(is_recording, record, lambda old, *_: old, history.snapshots, params, updates)
        updates, made = write_if(is_jump, jump, lambda old, *_: (old, no_jump()), updates, params, snapshots)
        # No window ever spans a jump.
        num_snapshots = jnp.where(is_jump, 0, visit.num_snapshots + 1)
        return Outcome(updates, history._replace(snapshots=snapshots), num_snapshots, is_jump, made)


class _Landing(NamedTuple):
    """Where the weights of a leaf jump to."""

    update: jax.Array
    move: jax.Array  # The jump, from where the optimizer's own update leads, in at least float32.
    moving: jax.Array  # Where that update leads, or 0 for a weight that did not move in the window.
    is_good: jax.Array
    is_cut: jax.Array


def _land(
    forecast: jax.Array, param: jax.Array, update: jax.Array, *earlier: jax.Array, horizon: Any, scale: Any
) -> _Landing:
    """Jump to a forecast, or as far in its direction as the bound allows."""
    # In at least float32: rounding a difference to bfloat16 would move the parameters off the forecast.
    dtype = wide_dtype(param)
    after = apply_updates(param, update).astype(dtype)
    # The range of a window of one snapshot is the last step.
    window = [snapshot.astype(dtype) for snapshot in (*(earlier or (param,)), after)]
    low, high = functools.reduce(jnp.minimum, window), functools.reduce(jnp.maximum, window)
    # Compare rather than subtract, because a mask may be infinite.
    is_frozen = low == high
    reach = (horizon * (high - low)).astype(dtype)
    forecast, before = forecast.astype(dtype), param.astype(dtype)
    bounded = jnp.clip(forecast, after - reach, after + reach)
    # In this form, scale 1 leaves only the difference from the forecast, rounded once.
    jumped = ((1 - scale) * (after - before) + scale * (bounded - before)).astype(update.dtype)
    is_finite = jnp.isfinite(forecast) & jnp.isfinite(apply_updates(param, jumped))
    return _Landing(
        # Checked here, too: compiled on its own, this may overflow by a rounding where the check did not.
        update=jnp.where(is_frozen | ~is_finite, update, jumped),
        move=jnp.where(is_frozen, 0, scale * (bounded - after)),
        moving=jnp.where(is_frozen, 0, after),
        is_good=is_frozen | is_finite,
        is_cut=~is_frozen & (bounded != forecast),
    )


def _check_landings(is_jump: jax.Array, leaves: Sequence[tuple[jax.Array, ...]], horizon: Any, scale: Any) -> Jump:
    """Return whether a jump may be made, and its size, computed one leaf at a time."""
    is_good, num_cut = is_jump, jnp.zeros([], jnp.int32)
    lengths: list[jax.Array] = [jnp.zeros([])]
    for forecast, param, *others in leaves:
        landing = _land(forecast, param, *others, horizon=horizon, scale=following(lengths[-1], scale, param))
        is_good &= jnp.all(landing.is_good)
        num_cut = add_counts(num_cut, jnp.sum(landing.is_cut, dtype=jnp.int32))
        lengths.append(norm(following(num_cut, landing.move, param)))
        lengths.append(norm(following(lengths[-1], landing.moving, param)))
    norms = jnp.asarray(lengths[1:])
    # All checks come before the first update is written, or XLA would copy what they read.
    is_good &= (num_cut >= 0) & ~jnp.any(jnp.isnan(norms))
    return choose(is_good, Jump(is_good, num_cut, relative_size(norms[::2], norms[1::2])), no_jump())
