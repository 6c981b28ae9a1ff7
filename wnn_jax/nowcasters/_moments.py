"""What is summed over whole tensors: how their values spread, and how they move."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
    """Sums over tensors and their history; of one tensor, or of several at once with a leading axis.

    A change leads from a snapshot to the next.

    Attributes:
      count: weights in a tensor.
      mean: of all values of all snapshots.
      squares: the sum of the squared distances of these values from the mean.
      changes: of each change, the sum of its squares over the weights.
      lagged: the sums of the products of all changes that are 1, 2, ... snapshots apart.
    """

    count: Any
    mean: Any
    squares: Any
    changes: tuple[Any, ...]
    lagged: tuple[Any, ...]


def moments_of_tensor(history: Sequence[Any]) -> Moments:
    """The moments of one tensor.

    Args:
      history: its snapshots, oldest first, NumPy or JAX arrays of one shape, not empty.
    """
    xp = np if isinstance(history[0], np.ndarray) else jnp
    rows = [snapshot.reshape(1, -1) for snapshot in history]
    anchors = rows[0][:, 0].astype(jnp.float32)
    sums = xp.stack([term.sum(axis=1) for term in _terms(rows, anchors)])
    moments = moments_from_sums(sums, anchors, xp.full(1, history[0].size, np.float32))
    return jax.tree.map(lambda moment: moment[0], moments)


def sum_terms(history: Sequence[jax.Array], anchors: jax.Array, is_counted: Any = None) -> jax.Array:
    """The sums over the weights that moments follow from.

    They add up over parts of a tensor, if the anchor of these is one.

    Args:
      history: snapshots, oldest first: `[tensors, weights]`.
      anchors: `[tensors]`, values not far from the weights, so that nothing cancels out where these are far from zero.
      is_counted: `[weights]`, which of them to count.

    Returns:
      `[sums, tensors]`.
    """
    terms = _terms(history, anchors)
    if is_counted is not None:
        terms = [jnp.where(is_counted[None], term, 0) for term in terms]
    # In one operation, and so in one pass over the history, of which nothing is ever copied.
    sums = jax.lax.reduce(
        tuple(terms),
        (jnp.zeros([], terms[0].dtype),) * len(terms),
        lambda one, other: tuple(a + b for a, b in zip(one, other, strict=True)),
        (1,),
    )
    return jnp.stack(sums)


def moments_from_sums(sums: Any, anchors: Any, count: Any) -> Moments:
    """The moments of tensors.

    Args:
      sums: `[sums, tensors]`, of `sum_terms`.
      anchors: `[tensors]`, those of the sums.
      count: `[tensors]`, how many weights there are in each.
    """
    total, squares, *others = sums
    # One change less than snapshots, and one lag less than changes.
    num_changes = (len(others) + 1) // 2
    num_values = (num_changes + 1) * count
    offset = total / num_values
    # Rounding must not make it negative.
    squares = abs(squares - num_values * offset**2)
    return Moments(count, anchors + offset, squares, tuple(others[:num_changes]), tuple(others[num_changes:]))


def _terms(history: Sequence[Any], anchors: Any) -> list[Any]:
    """What is summed up, `[tensors, weights]` each."""
    # Sums of half-precision numbers lose everything.
    history = [snapshot.astype(anchors.dtype) for snapshot in history]
    values = [snapshot - anchors[:, None] for snapshot in history]
    changes = [later - earlier for earlier, later in itertools.pairwise(history)]
    lagged = [
        sum(earlier * later for earlier, later in zip(changes, changes[lag:], strict=False))
        for lag in range(1, len(changes))
    ]
    return [sum(values), sum(value**2 for value in values), *(change**2 for change in changes), *lagged]
