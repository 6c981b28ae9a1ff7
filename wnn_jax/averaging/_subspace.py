"""Trainable weight averaging (TWA): training in the subspace that checkpoints span."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from wnn_jax._checks import check_choice
from wnn_jax.averaging._packing import Packed, unpack

Coefficients = Any

# On accelerators the default rounds the factors, which are weights here, to fewer bits than they have.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_tensordot = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "directions", "norms", "mixing"],
    meta_fields=["form", "bits", "shards"],
)
@dataclasses.dataclass(frozen=True)
class Subspace:
    """The weights that coefficients of checkpoints can reach. A pytree; make it with `make_subspace`.

    Attributes:
      mean: the uniform average of all checkpoints, a tree like the parameters.
      directions: a tree like the parameters of `[n, *shape]` arrays, sharded like the parameters; in few bits if
        `bits` says so. For `"deltas"`: each checkpoint minus the mean, each tensor divided by its norm. For
        `"orthonormal"`: each independent checkpoint minus the last, and then the last, each divided by its norm.
      norms: a tree like the parameters of `[n]` arrays, what each tensor was divided by.
      mixing: `[n, n]`, makes the orthonormal basis from the directions. `"deltas"` does not use it.
      form: `"deltas"` or `"orthonormal"`.
      bits: bits of a number in `directions`, or `None` for full precision.
      shards: for each tensor, into how many parts devices divide each axis.
    """

    mean: Any
    directions: Any
    norms: Any
    mixing: jax.Array
    form: Literal["deltas", "orthonormal"]
    bits: int | None
    shards: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The number of directions."""
        return self.mixing.shape[0]


def init_coefficients(subspace: Subspace, start: Literal["mean", "last"] = "mean") -> Coefficients:
    """Return coefficients to start training from.

    Args:
      subspace: from `make_subspace`.
      start: `"mean"` for the uniform average, `"last"` for the last checkpoint.

    Returns:
      A small tree, for any Optax optimizer. For `"deltas"`: an `[n]` array for each tensor, zeros for the uniform
      average. For `"orthonormal"`: one `[n]` array.

    Raises:
      ValueError: if `start` is unknown.
    """
    check_choice("start", start, ("mean", "last"), "start from the uniform average, or from the last checkpoint")
    if subspace.form == "deltas":
        # The last checkpoint is the last direction.
        return jax.tree.map(
            lambda norm: jnp.zeros_like(norm).at[-1].set(norm[-1] if start == "last" else 0), subspace.norms
        )
    if start == "last":
        (norms, *_) = jax.tree.leaves(subspace.norms)
        weights = jnp.zeros_like(subspace.mixing[0]).at[-1].set(norms[-1])
        return jnp.linalg.solve(subspace.mixing.T, weights)
    # The mean is in the span, and the basis is orthonormal.
    products = jax.tree.map(
        lambda leaf, mean: _tensordot(leaf.reshape(len(leaf), -1), mean.reshape(-1)), subspace.directions, subspace.mean
    )
    return _matmul(subspace.mixing, sum(jax.tree.leaves(products), jnp.zeros([])))


def combine(subspace: Subspace, coefficients: Coefficients) -> Any:
    """Return the weights that coefficients stand for. Differentiate through it.

    Args:
      subspace: from `make_subspace`.
      coefficients: like those of `init_coefficients`.

    Returns:
      A tree like the parameters, in float32 or wider.
    """
    if subspace.form == "orthonormal":
        weights = _matmul(subspace.mixing.T, coefficients)
        return jax.tree.map(lambda leaf: _tensordot(weights, leaf), subspace.directions)

    def add(mean: jax.Array, directions: Any, x: jax.Array, shards: tuple[int, ...]) -> jax.Array:
        if subspace.bits is None:
            return mean + _tensordot(x, directions)
        return _add_packed(mean, directions, x, subspace.bits, shards)

    shards = jax.tree.unflatten(jax.tree.structure(subspace.mean), subspace.shards)
    return jax.tree.map(add, subspace.mean, subspace.directions, coefficients, shards)


def averaging_coefficients(subspace: Subspace, coefficients: Coefficients) -> Any:
    """Return the share that each checkpoint has in a combination.

    The checkpoints are those that `make_subspace` did not leave out, oldest first. If the shares for `"deltas"` sum to
    less than 1, the rest is the share of the uniform average.

    Args:
      subspace: from `make_subspace`.
      coefficients: of a combination.

    Returns:
      For `"deltas"`: an `[n]` array for each tensor. For `"orthonormal"`: one `[n]` array. Its sum need not be 1,
      because these weights need not be an average.
    """
    if subspace.form == "deltas":
        return jax.tree.map(lambda x, norm: x / norm, coefficients, subspace.norms)
    (norms, *_) = jax.tree.leaves(subspace.norms)
    weights = _matmul(subspace.mixing.T, coefficients) / norms
    shares, total = weights[:-1], weights[-1]
    return jnp.append(shares, total - shares.sum())


def project_onto_subspace(subspace: Subspace) -> optax.GradientTransformation:
    """Replace a gradient by the part of it that the coefficients of a subspace can follow.

    In a chain before an optimizer of the SGD family, the parameters take the same steps as `combine` takes when that
    optimizer trains the coefficients. This does not hold for an optimizer that divides by the size of the gradient,
    such as Adam: train the coefficients instead.

    Args:
      subspace: from `make_subspace`. For `"orthonormal"` this is the orthogonal projection.

    Returns:
      A transformation without a state.
    """

    def combine_directions(coefficients: Coefficients) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, subspace.mean)
        return combine(dataclasses.replace(subspace, mean=zeros), coefficients)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        transposed = jax.linear_transpose(combine_directions, jax.eval_shape(lambda: init_coefficients(subspace)))
        wide = jax.tree.map(lambda update, mean: update.astype(mean.dtype), updates, subspace.mean)
        projected = combine_directions(*transposed(wide))
        return optax.tree.cast_like(projected, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _add_packed(
    mean: jax.Array, packed: Packed, coefficients: jax.Array, bits: int, shards: tuple[int, ...]
) -> jax.Array:
    # Every axis becomes two: the shards, and what is in one shard. With a coefficient for each shard, the loop of the
    # backward pass sums within shards. Devices then add up these sums once, for all directions.
    split = [part for size, number in zip(mean.shape, shards, strict=True) for part in (number, size // number)]
    ones = [part for number in shards for part in (number, 1)]
    spread = jnp.broadcast_to(coefficients.reshape(-1, *(1 for _ in ones)), (len(coefficients), *ones))

    # One checkpoint at a time, and in the backward pass again, so that never more than one is unpacked.
    @jax.checkpoint
    def add(total: jax.Array, one: tuple[Packed, jax.Array]) -> tuple[jax.Array, None]:
        direction, coefficient = one
        return total + coefficient * unpack(direction, bits, mean.shape).reshape(split), None

    return jax.lax.scan(add, mean.reshape(split), (packed, spread))[0].reshape(mean.shape)
