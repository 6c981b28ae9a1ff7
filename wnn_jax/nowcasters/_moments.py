"""What is summed over whole tensors: how their values spread, and how they move."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype


class Moments(NamedTuple):
    """Sums over tensors and their history; of one tensor, or of several at once with a leading axis.

    A change leads from a snapshot to the next. Sums of squares and products are in squares of the unit, so that none
    overflows or vanishes.

    Attributes:
      count: weights in a tensor.
      unit: a power of two of the size of its largest value.
      mean: of all values of all snapshots.
      squares: the sum of the squared distances of these values from the mean.
      changes: of each change, the sum of its squares over the weights.
      lagged: the sums of the products of all changes that are 1, 2, ... snapshots apart.
    """

    count: Any
    unit: Any
    mean: Any
    squares: Any
    changes: tuple[Any, ...]
    lagged: tuple[Any, ...]


def moments_of_tensor(history: Sequence[Any]) -> Moments:
    """The moments of one tensor.

    Args:
      history: its snapshots, oldest first, NumPy or JAX arrays of one shape, not empty.
    """
    xp = namespace(history)
    rows = [snapshot.reshape(1, -1) for snapshot in history]
    anchors = rows[0][:, 0].astype(wide_dtype(rows[0]))
    units = units_of(largest_of(rows))
    sums = xp.stack([term.sum(axis=1) for term in _terms(rows, anchors, units)])
    moments = moments_from_sums(sums, anchors, units, xp.full(1, history[0].size, np.float32))
    return jax.tree.map(lambda moment: moment[0], moments)


def largest_of(history: Sequence[Any]) -> Any:
    """The largest absolute value of each tensor: `[tensors]`, from snapshots `[tensors, weights]`."""
    return functools.reduce(namespace(history).maximum, (abs(snapshot).max(axis=1) for snapshot in history))


def units_of(largest: Any) -> Any:
    """The units of tensors, from their largest absolute values, in float32 or wider."""
    xp = namespace([largest])
    limits = jnp.finfo(wide_dtype(largest))
    # Neither a unit nor its reciprocal, by which a compiler may multiply, is denormal.
    exponents = xp.clip(xp.frexp(largest.astype(limits.dtype))[1] - 1, limits.minexp + 1, limits.maxexp - 4)
    return xp.ldexp(xp.ones_like(largest, limits.dtype), exponents)


def sum_terms(history: Sequence[jax.Array], anchors: jax.Array, units: jax.Array, is_counted: Any = None) -> jax.Array:
    """The sums over the weights that moments follow from.

    They add up over parts of a tensor, if the anchor of these is one.

    Args:
      history: snapshots, oldest first: `[tensors, weights]`.
      anchors: `[tensors]`, values not far from the weights, so that nothing cancels out where these are far from zero.
      units: `[tensors]`, those of the tensors.
      is_counted: `[weights]`, which of them to count.

    Returns:
      `[sums, tensors]`.
    """
    terms = _terms(history, anchors, units)
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


def moments_from_sums(sums: Any, anchors: Any, units: Any, count: Any) -> Moments:
    """The moments of tensors.

    Args:
      sums: `[sums, tensors]`, of `sum_terms`.
      anchors: `[tensors]`, those of the sums.
      units: `[tensors]`, those of the sums.
      count: `[tensors]`, how many weights there are in each.
    """
    total, squares, *others = sums
    # One change less than snapshots, and one lag less than changes.
    num_changes = (len(others) + 1) // 2
    num_values = (num_changes + 1) * count
    offset = total / num_values
    # Rounding must not make it negative.
    squares = abs(squares - num_values * offset**2)
    changes, lagged = tuple(others[:num_changes]), tuple(others[num_changes:])
    return Moments(count, units, anchors + units * offset, squares, changes, lagged)


def ratio(value: Any, size: Any) -> Any:
    """A value in units of a size, or as it is where that is zero."""
    return value / namespace([size]).where(size == 0, 1, size)


def log_ratio(value: Any, size: Any) -> Any:
    """Half the logarithm of a ratio, from -4.6 to 4.6: of the order of 1 for what is compared here."""
    xp = namespace([size])
    return xp.log(xp.clip(ratio(value, size), 1e-4, 1e4)) / 2


def _terms(history: Sequence[Any], anchors: Any, units: Any) -> list[Any]:
    """What is summed up, `[tensors, weights]` each."""
    # Sums of half-precision numbers lose everything. To divide by a power of two loses nothing.
    history = [snapshot.astype(anchors.dtype) / units[:, None] for snapshot in history]
    values = [snapshot - (anchors / units)[:, None] for snapshot in history]
    changes = [later - earlier for earlier, later in itertools.pairwise(history)]
    lagged = [
        sum(earlier * later for earlier, later in zip(changes, changes[lag:], strict=False))
        for lag in range(1, len(changes))
    ]
    return [sum(values), sum(value**2 for value in values), *(change**2 for change in changes), *lagged]


def namespace(arrays: Sequence[Any]) -> Any:
    """NumPy for arrays of NumPy, and else JAX."""
    return np if isinstance(arrays[0], np.ndarray) else jnp
