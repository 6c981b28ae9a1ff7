"""What happens to the parameters where the history is a drift."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wnn_jax._conditionals import any_member
from wnn_jax._history import DriftFormat, DriftHistory, difference, wide_dtype
from wnn_jax._jump import Outcome, Visit, all_finite, check_prediction, choose
from wnn_jax._nowcaster import DriftNowcaster, Motion


@dataclasses.dataclass(frozen=True)
class DriftRule:
    """Remembers at every visit how far the optimizer moved the parameters since the last one, and moves them on."""

    nowcaster: DriftNowcaster
    history: DriftFormat
    num_steps: int | None

    def update(self, visit: Visit, updates: Any, history: DriftHistory, params: Any, roles: Any) -> Outcome:
        """Goes on from the last visit, or leaves all as it is."""
        history = DriftHistory(*history)  # A checkpoint may have made a plain tuple of it.
        # The first visit of a history has no last one, and only remembers where the parameters are.
        is_jump = visit.is_due & (visit.num_snapshots > 0)
        step = visit.num_snapshots * visit.snapshot_every

        def go_on(updates: Any, history: DriftHistory, params: Any) -> tuple[Any, DriftHistory, jax.Array]:
            anchor, old_means = self.history.read(history)
            after = optax.apply_updates(params, updates)
            displacement = jax.tree.map(difference, after, anchor)
            memories = self.nowcaster.memories(step, visit.snapshot_every)
            means = tuple(
                jax.tree.map(lambda mean, new, share=visit.snapshot_every / memory: mean + share * (new - mean), *trees)
                for memory, trees in zip(memories, ((mean, displacement) for mean in old_means), strict=True)
            )
            means = choose(is_jump, means, jax.tree.map(jnp.zeros_like, means))
            # What is kept is made one after the other, and each of what was made before it: then XLA writes it where
            # the old is, and copies nothing on an ordinary step.
            history = history._replace(means=self.history.write_means(choose(visit.is_due, means, old_means)))
            means = self.history.read(history).means
            jump = self.nowcaster(Motion(means, displacement, after, step, visit.snapshot_every, self.num_steps), roles)
            check_prediction(jump, params)
            jumped = jax.tree.map(
                lambda update, jump: (update.astype(wide_dtype(update)) + visit.scale * jump).astype(update.dtype),
                updates,
                jump,
            )
            is_accepted = is_jump & all_finite(jumped)
            # A jump of no length changes no bit.
            new_updates = choose(is_accepted & (visit.scale != 0), jumped, updates)
            # The anchor is where the jump leads to, so that it is no part of the next displacement.
            anchor = choose(visit.is_due, optax.apply_updates(params, new_updates), anchor)
            return new_updates, history._replace(anchor=self.history.write_anchor(anchor)), is_accepted

        # With the writing branch taken on True, for the same reason.
        updates, history, is_accepted = jax.lax.cond(
            any_member(visit.is_due),
            go_on,
            lambda updates, history, _: (updates, history, jnp.zeros_like(is_jump)),
            updates,
            history,
            params,
        )
        return Outcome(updates, history, is_jump, is_accepted)

    def count(self, visit: Visit, outcome: Outcome) -> jax.Array:
        """How many visits are remembered after one: none where the forecast was not finite, as its history is not."""
        return jnp.where(outcome.is_jump & ~outcome.is_accepted, 0, visit.num_snapshots + 1)
