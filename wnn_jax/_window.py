"""What happens to the parameters where the history is a window of snapshots."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._history import Window, WindowFormat
from wnn_jax._jump import Jump, Outcome, Visit, add_counts, check_prediction, no_jump, relative_size
from wnn_jax._nowcaster import DEFAULT_HORIZON, Nowcaster
from wnn_jax._trees import any_member, apply_updates, choose, following, norm, wide_dtype


@dataclasses.dataclass(frozen=True)
class WindowRule:
    """Fills a window with the snapshots of a nowcaster, then jumps to the forecast, then begins another."""

    nowcaster: Nowcaster
    history: WindowFormat

    def update(self, visit: Visit, updates: Any, history: Window, params: Any, roles: Any) -> Outcome:
        """Records a snapshot, or jumps, or leaves all as it is."""
        slot = visit.num_snapshots
        is_jump = visit.is_due & (slot == self.history.offsets[-1])
        is_recording = visit.is_due & ~is_jump

        # Two conditionals, each with the writing branch taken on True and returning no more than it writes: on an
        # ordinary step XLA then copies nothing. The parameters after the step are computed in the branches, because
        # one more operand of a conditional is one more buffer that every step fills.
        @jax.named_scope("record")
        def record(history: Window, params: Any, updates: Any) -> Window:
            slot_now = jnp.where(is_recording, slot, -1)
            return self.history.write(history, slot_now, apply_updates(params, updates))

        history = jax.lax.cond(any_member(is_recording), record, lambda history, *_: history, history, params, updates)

        @jax.named_scope("jump")
        def jump(updates: Any, params: Any, history: Window) -> tuple[Any, Jump]:
            earlier = self.history.read(history)
            window = (*earlier, apply_updates(params, updates))
            with jax.named_scope("forecast"):
                prediction = self.nowcaster(window, roles, visit.horizon)
            check_prediction(prediction, params)
            horizon = getattr(self.nowcaster, "default_horizon", DEFAULT_HORIZON)
            horizon = horizon if visit.horizon is None else visit.horizon

            leaves = list(zip(*map(jax.tree.leaves, (prediction, params, updates, *earlier)), strict=True))

            # Twice, once for the checks, rather than once and kept: the one is reading, the other a copy of the model.
            made = _check(is_jump, leaves, horizon, visit.scale)
            landings = [_land(*leaf, horizon=horizon, scale=visit.scale) for leaf in leaves]
            jumped = jax.tree.unflatten(jax.tree.structure(params), [landing.update for landing in landings])
            # A jump of no length counts, or schedules of the nowcast's index would stop at it, but changes no bit.
            return choose(made.is_accepted & (visit.scale != 0), jumped, updates), made

        updates, made = jax.lax.cond(
            any_member(is_jump), jump, lambda updates, *_: (updates, no_jump()), updates, params, history
        )
        return Outcome(updates, history, is_jump, made)

    def count(self, visit: Visit, outcome: Outcome) -> jax.Array:
        """How many snapshots there are after a visit: none after a jump, so that no window ever spans one."""
        return jnp.where(outcome.is_jump, 0, visit.num_snapshots + 1)


class _Landing(NamedTuple):
    """Where the weights of a leaf jump to.

    Attributes:
      update: from the parameter to there.
      move: from where the optimizer's own update leads, in float32 or wider.
      moving: where that is; 0 for a weight that does not move.
      is_good: whether all of it is finite.
      is_cut: whether the bound holds it back.
    """

    update: jax.Array
    move: jax.Array
    moving: jax.Array
    is_good: jax.Array
    is_cut: jax.Array


def _land(
    predicted: jax.Array, param: jax.Array, update: jax.Array, *earlier: jax.Array, horizon: Any, scale: Any
) -> _Landing:
    """Jumps, no further than the bound, from where an update leads to a forecast."""
    # In at least fp32: what bf16 loses in a difference would move the parameters off the prediction.
    dtype = wide_dtype(param)
    after = apply_updates(param, update).astype(dtype)
    # A window of one snapshot has no range but that of the step.
    window = [snapshot.astype(dtype) for snapshot in (*(earlier or (param,)), after)]
    low, high = functools.reduce(jnp.minimum, window), functools.reduce(jnp.maximum, window)
    # Compared, and not subtracted, for a mask may be infinite.
    is_frozen = low == high
    reach = (horizon * (high - low)).astype(dtype)
    predicted, before = predicted.astype(dtype), param.astype(dtype)
    bounded = jnp.clip(predicted, after - reach, after + reach)
    # Of this form, because at scale 1 nothing but the difference from the prediction is left, rounded once.
    jumped = ((1 - scale) * (after - before) + scale * (bounded - before)).astype(update.dtype)
    is_finite = jnp.isfinite(predicted) & jnp.isfinite(apply_updates(param, jumped))
    return _Landing(
        # Compiled on its own, this may overflow by a rounding where the check did not.
        update=jnp.where(is_frozen | ~is_finite, update, jumped),
        move=jnp.where(is_frozen, 0, scale * (bounded - after)),
        moving=jnp.where(is_frozen, 0, after),
        is_good=is_frozen | is_finite,
        is_cut=~is_frozen & (bounded != predicted),
    )


def _check(is_jump: jax.Array, leaves: Sequence[tuple[jax.Array, ...]], horizon: Any, scale: Any) -> Jump:
    """What comes of a jump, found out one leaf after the other."""
    is_good, num_cut = is_jump, jnp.zeros([], jnp.int32)
    lengths: list[jax.Array] = [jnp.zeros([])]
    for predicted, param, *others in leaves:
        param = jax.lax.optimization_barrier(param)
        landing = _land(predicted, param, *others, horizon=horizon, scale=following(lengths[-1], scale, param))
        is_good &= jnp.all(landing.is_good)
        num_cut = add_counts((num_cut, jnp.sum(landing.is_cut, dtype=jnp.int32)))
        lengths.append(norm(following(num_cut, landing.move, param)))
        lengths.append(norm(following(lengths[-1], landing.moving, param)))
    found = jnp.asarray(lengths[1:])
    # All of it is known before the first update is written, or what it reads would have to be copied.
    is_good &= (num_cut >= 0) & ~jnp.any(jnp.isnan(found))
    return choose(is_good, Jump(is_good, num_cut, relative_size(found[::2], found[1::2])), no_jump())
