"""What happens to the parameters where the history is a drift."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._history import DriftFormat, DriftHistory
from wnn_jax._jump import MAX_COUNT, Jump, Outcome, Visit, add_counts, check_prediction, no_jump, relative_size
from wnn_jax._nowcaster import DriftNowcaster, Motion
from wnn_jax._trees import all_finite, any_member, apply_updates, choose, difference, norms, wide_dtype

# How far a tensor may jump, in multiples of the longest of its running means.
_MAX_GAIN = 100.0


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

        @jax.named_scope("visit")
        def go_on(updates: Any, history: DriftHistory, params: Any) -> tuple[Any, DriftHistory, Jump]:
            anchor, old_means = self.history.read(history)
            after = apply_updates(params, updates)
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
            motion = Motion(means, displacement, after, step, visit.snapshot_every, self.num_steps)
            with jax.named_scope("forecast"):
                jump = self.nowcaster(motion, roles)
            check_prediction(jump, params)
            bounded = _bound(jump, means)
            jumped = jax.tree.map(
                lambda update, move: (update.astype(wide_dtype(update)) + visit.scale * move).astype(update.dtype),
                updates,
                bounded.jump,
            )
            is_accepted = is_jump & all_finite(apply_updates(params, jumped))
            moving = jnp.where(bounded.limits > 0, norms(after), 0)
            size = jnp.abs(visit.scale) * relative_size(bounded.lengths, moving)
            made = choose(is_accepted, Jump(is_accepted, bounded.num_cut, size.astype(jnp.float32)), no_jump())
            # A jump of no length changes no bit.
            new_updates = choose(is_accepted & (visit.scale != 0), jumped, updates)
            # The anchor is where the jump leads to, so that it is no part of the next displacement.
            anchor = choose(visit.is_due, apply_updates(params, new_updates), anchor)
            return new_updates, history._replace(anchor=self.history.write_anchor(anchor)), made

        # With the writing branch taken on True, for the same reason.
        updates, history, made = jax.lax.cond(
            any_member(visit.is_due),
            go_on,
            lambda updates, history, _: (updates, history, no_jump()),
            updates,
            history,
            params,
        )
        return Outcome(updates, history, is_jump, made)

    def count(self, visit: Visit, outcome: Outcome) -> jax.Array:
        """How many visits are remembered after one: none where the forecast was not finite, as its history is not."""
        return jnp.where(outcome.is_jump & ~outcome.jump.is_accepted, 0, visit.num_snapshots + 1)


class _Bounded(NamedTuple):
    """A jump that is not too long.

    Attributes:
      jump: a tree like the parameters.
      lengths: its norm, by tensors: `[tensors]`.
      limits: those of its norm, `[tensors]`.
      num_cut: int32, how many weights were held back.
    """

    jump: Any
    lengths: jax.Array
    limits: jax.Array
    num_cut: jax.Array


def _bound(jump: Any, means: tuple[Any, ...]) -> _Bounded:
    """Shortens the jump of each tensor that goes further than the bound."""
    lengths = norms(jump)
    limits = _MAX_GAIN * functools.reduce(jnp.maximum, map(norms, means))
    is_cut = lengths > limits
    shares = jax.lax.optimization_barrier(jnp.where(is_cut, limits / lengths, 1))
    leaves, treedef = jax.tree.flatten(jump)
    bounded = [share.astype(leaf.dtype) * leaf for share, leaf in zip(shares, leaves, strict=True)]
    num_cut = add_counts(
        jnp.where(is_leaf_cut, min(leaf.size, MAX_COUNT), 0) for is_leaf_cut, leaf in zip(is_cut, leaves, strict=True)
    )
    return _Bounded(jax.tree.unflatten(treedef, bounded), shares * lengths, limits, num_cut)
