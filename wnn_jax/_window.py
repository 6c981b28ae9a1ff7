"""What happens to the parameters where the history is a window of snapshots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wnn_jax._conditionals import any_member
from wnn_jax._history import Window, WindowFormat, wide_dtype
from wnn_jax._jump import Outcome, Visit, all_finite, check_prediction, choose
from wnn_jax._nowcaster import Nowcaster


@dataclasses.dataclass(frozen=True)
class WindowRule:
    """Fills a window of `nowcaster.context` snapshots, then jumps to the forecast, then begins another."""

    nowcaster: Nowcaster
    history: WindowFormat

    def update(self, visit: Visit, updates: Any, history: Window, params: Any, roles: Any) -> Outcome:
        """Records a snapshot, or jumps, or leaves all as it is."""
        slot = visit.num_snapshots
        is_jump = visit.is_due & (slot == self.nowcaster.context - 1)
        is_recording = visit.is_due & ~is_jump

        # Two conditionals, each with the writing branch taken on True and returning no more than it writes: on an
        # ordinary step XLA then copies nothing. The parameters after the step are computed in the branches, because
        # one more operand of a conditional is one more buffer that every step fills.
        def record(history: Window, params: Any, updates: Any) -> Window:
            slot_now = jnp.where(is_recording, slot, -1)
            return self.history.write(history, slot_now, optax.apply_updates(params, updates))

        history = jax.lax.cond(any_member(is_recording), record, lambda history, *_: history, history, params, updates)

        def jump(updates: Any, params: Any, history: Window) -> tuple[Any, jax.Array]:
            window = (*self.history.read(history), optax.apply_updates(params, updates))
            prediction = self.nowcaster(window, roles, visit.horizon)
            check_prediction(prediction, params)
            if getattr(self.nowcaster, "moves_frozen", False):
                prediction = _hold_frozen(prediction, window)

            def replace(prediction: Any, params: Any) -> Any:
                after = optax.apply_updates(params, updates)
                return jax.tree.map(
                    lambda predicted, own, param, update: _jump(predicted, own, param, visit.scale).astype(
                        update.dtype
                    ),
                    prediction,
                    after,
                    params,
                    updates,
                )

            # Twice, once for the check, rather than once and kept: the one is reading, the other a copy of the model.
            is_accepted = is_jump & all_finite(replace(prediction, jax.lax.optimization_barrier(params)))
            # A jump of no length counts, or schedules of the nowcast's index would stop at it, but changes no bit.
            return choose(is_accepted & (visit.scale != 0), replace(prediction, params), updates), is_accepted

        updates, is_accepted = jax.lax.cond(
            any_member(is_jump),
            jump,
            lambda updates, *_: (updates, jnp.zeros_like(is_jump)),
            updates,
            params,
            history,
        )
        return Outcome(updates, history, is_jump, is_accepted)

    def count(self, visit: Visit, outcome: Outcome) -> jax.Array:
        """How many snapshots there are after a visit: none after a jump, so that no window ever spans one."""
        return jnp.where(outcome.is_jump, 0, visit.num_snapshots + 1)


def _jump(predicted: jax.Array, after: jax.Array, param: jax.Array, scale: Any) -> jax.Array:
    """The update that leads from `param` to `after + scale * (predicted - after)`."""
    # In at least fp32: what bf16 loses in a difference would move the parameters off the prediction.
    dtype = wide_dtype(param)
    param = param.astype(dtype)
    # Of this form, because at scale 1 nothing but the difference from the prediction is left, rounded once.
    return (1 - scale) * (after.astype(dtype) - param) + scale * (predicted.astype(dtype) - param)


def _hold_frozen(prediction: Any, window: Window) -> Any:
    """The prediction, with the weights that did not change within the window kept as they are."""

    def hold(predicted: jax.Array, *leaf_history: jax.Array) -> jax.Array:
        last = leaf_history[-1]
        is_frozen = jnp.ones_like(last, dtype=bool)
        for snapshot in leaf_history[:-1]:
            is_frozen &= snapshot == last
        return jnp.where(is_frozen, last, predicted)

    return jax.tree.map(hold, prediction, *window)
