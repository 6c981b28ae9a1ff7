"""What the kinds of history share: when they are visited, and how a jump takes the place of an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Visit(NamedTuple):
    """The visit to the history that may be due at a step.

    Attributes:
      step: int32, the steps before this one.
      is_due: bool, whether there is one.
      num_snapshots: int32, how many visits the history remembers already.
      snapshot_every: steps between visits.
      horizon: how many snapshots ahead to forecast, or `None`.
      scale: how far to go along a jump.
    """

    step: jax.Array
    is_due: jax.Array
    num_snapshots: jax.Array
    snapshot_every: Any
    horizon: Any
    scale: Any


class Outcome(NamedTuple):
    """What a step comes to.

    Attributes:
      updates: of the parameters.
      history: after the step.
      is_jump: bool, whether a forecast was made.
      is_accepted: bool, whether it was finite.
    """

    updates: Any
    history: Any
    is_jump: jax.Array
    is_accepted: jax.Array


def all_finite(tree: Any) -> jax.Array:
    """Whether there is no NaN and no infinity in a tree."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees; under `vmap`, for every member its own."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


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
