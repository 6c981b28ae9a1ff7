"""What happens to the parameters where the history is a window of snapshots of their running mean."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._history import AveragedWindow, AveragedWindowFormat
from wnn_jax._jump import Jump, Outcome, Visit, no_jump
from wnn_jax._trees import all_finite, any_member, apply_updates, choose, wide_dtype
from wnn_jax._window import WindowRule


@dataclasses.dataclass(frozen=True)
class AveragedWindowRule:
    """Forecasts the running mean of the parameters, and moves both by as much as the mean jumps."""

    window: WindowRule
    history: AveragedWindowFormat

    def update(self, visit: Visit, updates: Any, history: AveragedWindow, params: Any, roles: Any) -> Outcome:
        """Goes on with the mean, and makes of it what `WindowRule` would make of the parameters."""
        history = AveragedWindow(*history)  # A checkpoint may have made a plain tuple of it.
        # The mean begins as the parameters.
        mean = jax.tree.map(
            lambda mean, param: jnp.where(visit.is_first, param.astype(mean.dtype), mean), history.mean, params
        )
        steps = jax.tree.map(
            lambda mean, after: (1 - self.history.decay) * (after.astype(mean.dtype) - mean),
            mean,
            apply_updates(params, updates),
        )
        outcome = self.window.update(visit, steps, history.window, mean, roles)

        def jump(updates: Any, jumped: Any, steps: Any, params: Any) -> tuple[Any, Jump]:
            moved = jax.tree.map(
                lambda update, new, old: (update.astype(wide_dtype(update)) + (new - old)).astype(update.dtype),
                updates,
                jumped,
                steps,
            )
            is_accepted = outcome.jump.is_accepted & all_finite(apply_updates(params, moved))
            updates = choose(is_accepted & (visit.scale != 0), moved, updates)
            return updates, choose(is_accepted, outcome.jump, no_jump())

        updates, made = jax.lax.cond(
            any_member(outcome.is_jump),
            jump,
            lambda updates, *_: (updates, no_jump()),
            updates,
            outcome.updates,
            steps,
            params,
        )
        # Where the parameters cannot follow, the mean stays with them.
        mean = jax.tree.map(
            lambda mean, jumped, step: mean + jnp.where(outcome.is_jump & ~made.is_accepted, step, jumped),
            mean,
            outcome.updates,
            steps,
        )
        return Outcome(updates, AveragedWindow(mean, outcome.history), outcome.is_jump, made)

    def count(self, visit: Visit, outcome: Outcome) -> jax.Array:
        """See `WindowRule.count`."""
        return self.window.count(visit, outcome)
