"""What the kinds of history share: when they are visited, and how a jump takes the place of an update."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._trees import norm

# All counts stop here.
MAX_COUNT = 2**31 - 1


class Visit(NamedTuple):
    """The visit to the history that may be due at a step.

    Attributes:
      is_first: bool, whether nothing is known of the parameters before this step.
      is_due: bool, whether there is a visit.
      num_snapshots: int32, how many visits the history remembers already.
      snapshot_every: steps between visits.
      horizon: how many snapshots ahead to forecast, or `None`.
      scale: how far to go along a jump.
    """

    is_first: jax.Array
    is_due: jax.Array
    num_snapshots: jax.Array
    snapshot_every: Any
    horizon: Any
    scale: Any


class Jump(NamedTuple):
    """What was made of a forecast.

    Attributes:
      is_accepted: bool, whether the parameters jumped: a forecast that is not finite is rejected.
      num_cut: int32, the weights that the bound held back.
      size: float32, the norm of the jump beside that of the parameters.
    """

    is_accepted: jax.Array
    num_cut: jax.Array
    size: jax.Array


class Outcome(NamedTuple):
    """What a step comes to.

    Attributes:
      updates: of the parameters.
      history: after the step.
      is_jump: bool, whether a forecast was made.
      jump: what was made of it.
    """

    updates: Any
    history: Any
    is_jump: jax.Array
    jump: Jump


def no_jump() -> Jump:
    """There was no forecast, or it was rejected."""
    return Jump(jnp.array(False), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))


def relative_size(moves: jax.Array, params: jax.Array) -> jax.Array:
    """The norm of a jump beside that of the parameters, both by leaves, `[leaves]`, as float32."""
    of_params = norm(params)
    return (norm(moves) / jnp.maximum(of_params, jnp.finfo(of_params.dtype).tiny)).astype(jnp.float32)


def add_counts(counts: Iterable[jax.Array]) -> jax.Array:
    """The sum of int32 counts, or the largest int32."""
    total = jnp.zeros([], jnp.int32)
    for count in counts:
        total += jnp.minimum(count, MAX_COUNT - total)
    return total


def check_prediction(prediction: Any, params: Any) -> None:
    """Raises a `ValueError` unless a nowcaster returned a tree like the parameters."""

    def shapes(tree: Any) -> list[tuple[int, ...]]:
        return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    # Structures and leaves, not trees: a node of a user's class need not define equality.
    if jax.tree.structure(prediction) != jax.tree.structure(params) or shapes(prediction) != shapes(params):
        raise ValueError(
            f"the nowcaster returned the shapes {jax.tree.map(jnp.shape, prediction)} for parameters of the shapes "
            f"{jax.tree.map(jnp.shape, params)}; it must return a tree like the parameters."
        )
