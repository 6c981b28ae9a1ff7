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
    """The weights that coefficients of checkpoints reach. A pytree; make it with `make_subspace`.

    Attributes:
      mean: the uniform average of all checkpoints, a tree like the parameters.
      directions: a tree like the parameters with `[n, *shape]` arrays, sharded like them, or these in few bits: the
        distances of the `n` independent checkpoints from the mean, each tensor divided by its norm; in the orthonormal
        form the distances of the checkpoints from the last, and that one, each divided by its norm as a whole.
      norms: a tree like the parameters with `[n]` arrays, what each tensor was divided by.
      mixing: `[n, n]`, which makes the orthonormal basis from the directions; of no use to the other form.
      form: `"deltas"` or `"orthonormal"`.
      bits: of a number in `directions`, or `None` if they are as they are.
      shards: for each tensor, in how many parts its axes are, on as many devices.
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
        """How many directions there are."""
        return self.mixing.shape[0]


def init_coefficients(subspace: Subspace, start: Literal["mean", "last"] = "mean") -> Coefficients:
    """Coefficients to start training from.

    Args:
      subspace: what they are of.
      start: `"mean"`, the uniform average; `"last"`, the last checkpoint.

    Returns:
      A small tree, for any Optax optimizer: per tensor `[n]` for the form `"deltas"`, zeros for the uniform average;
      one `[n]` array for `"orthonormal"`.

    Raises:
      ValueError: if `start` is unknown.
    """
    check_choice("start", start, ("mean", "last"), "start from the uniform average, or from the last checkpoint")
    if subspace.form == "deltas":
        # The last checkpoint is the last direction.
        return jax.tree.map(
            lambda norm: jnp.zeros_like(norm).at[-1].set(norm[-1]) if start == "last" else jnp.zeros_like(norm),
            subspace.norms,
        )
    # The mean is in the span, and the basis orthonormal.
    if start == "last":
        (norms, *_) = jax.tree.leaves(subspace.norms)
        of_last = jnp.zeros_like(subspace.mixing[0]).at[-1].set(norms[-1])
        return jnp.linalg.solve(subspace.mixing.T, of_last)
    return _matmul(subspace.mixing, _project(subspace.directions, subspace.mean))


def combine(subspace: Subspace, coefficients: Coefficients) -> Any:
    """The weights that coefficients stand for. Differentiate through it.

    Args:
      subspace: from `make_subspace`.
      coefficients: like those of `init_coefficients`.

    Returns:
      A tree like the parameters, in float32 or wider.
    """
    if subspace.form == "orthonormal":
        weights = _matmul(subspace.mixing.T, coefficients)
        return jax.tree.map(lambda leaf: _tensordot(weights, leaf), subspace.directions)
    if subspace.bits is None:
        return jax.tree.map(
            lambda mean, leaf, x: mean + _tensordot(x, leaf),
            subspace.mean,
            subspace.directions,
            coefficients,
        )
    return jax.tree.map(
        lambda mean, packed, x, shards: _add_packed(mean, packed, x, subspace.bits or 0, shards),
        subspace.mean,
        subspace.directions,
        coefficients,
        jax.tree.unflatten(jax.tree.structure(subspace.mean), subspace.shards),
    )


def averaging_coefficients(subspace: Subspace, coefficients: Coefficients) -> Any:
    """What share of each direction's checkpoint is in the combination.

    The checkpoints are those that were not left out, oldest first, and the last. What is missing to the combination is
    the uniform average of all, in the share that the sum is short of 1.

    Args:
      subspace: from `make_subspace`.
      coefficients: of a combination.

    Returns:
      Per tensor for the form `"deltas"`, else once for all: an `[n]` array. For `"orthonormal"` its sum need not be 1:
      those weights are not bound to be an average.
    """
    if subspace.form == "deltas":
        return jax.tree.map(lambda x, norm: x / norm, coefficients, subspace.norms)
    (norms, *_) = jax.tree.leaves(subspace.norms)
    weights = _matmul(subspace.mixing.T, coefficients) / norms
    of_moves, total = weights[:-1], weights[-1]
    return jnp.append(of_moves, total - of_moves.sum())


def project_onto_subspace(subspace: Subspace) -> optax.GradientTransformation:
    """Replaces a gradient by what the coefficients of the subspace can follow of it.

    With an optimizer of the SGD family behind it in a chain, the parameters take the steps that `combine` takes when
    the same optimizer trains the coefficients. For one that divides by the size of the gradient, like Adam, that is not
    so; train the coefficients then.

    Args:
      subspace: from `make_subspace`. For the form `"orthonormal"` this is the orthogonal projection.

    Returns:
      A transformation without a state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from wnn_jax import averaging
      >>> checkpoints = [{"w": jnp.array([1.0, 0.0, 1.0])}, {"w": jnp.array([0.0, 2.0, 1.0])}]
      >>> subspace = averaging.make_subspace(checkpoints, form="orthonormal")
      >>> tx = optax.chain(averaging.project_onto_subspace(subspace), optax.sgd(0.1, momentum=0.9))
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # Linear, so that it is its own derivative; what is constant in it drops out.
        transposed = jax.linear_transpose(
            functools.partial(_combine_directions, subspace), jax.eval_shape(lambda: init_coefficients(subspace))
        )
        wide = jax.tree.map(lambda update, mean: update.astype(mean.dtype), updates, subspace.mean)
        (of_coefficients,) = transposed(wide)
        projected = _combine_directions(subspace, of_coefficients)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), projected, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _combine_directions(subspace: Subspace, coefficients: Coefficients) -> Any:
    zero = dataclasses.replace(subspace, mean=jax.tree.map(jnp.zeros_like, subspace.mean))
    return combine(zero, coefficients)


def _add_packed(
    mean: jax.Array, packed: Packed, coefficients: jax.Array, bits: int, shards: tuple[int, ...]
) -> jax.Array:
    # Every axis as two, the shards and what is in one. With a coefficient for each shard, the loop of the backward pass
    # sums within shards alone, and their sums are added once, for all directions.
    split = [part for size, number in zip(mean.shape, shards, strict=True) for part in (number, size // number)]
    ones = [part for number in shards for part in (number, 1)]
    spread = jnp.broadcast_to(coefficients.reshape(-1, *(1 for _ in ones)), (len(coefficients), *ones))

    # One checkpoint at a time, and in the backward pass again, so that never more than one is unpacked.
    @jax.checkpoint
    def add(total: jax.Array, one: tuple[Packed, jax.Array]) -> tuple[jax.Array, None]:
        direction, coefficient = one
        return total + coefficient * unpack(direction, bits, mean.shape).reshape(split), None

    return jax.lax.scan(add, mean.reshape(split), (packed, spread))[0].reshape(mean.shape)


def _project(directions: Any, tree: Any) -> jax.Array:
    """The inner products of the directions with weights."""
    products = jax.tree.map(
        lambda leaf, other: _tensordot(leaf.reshape(len(leaf), -1), other.reshape(-1)),
        directions,
        tree,
    )
    return sum(jax.tree.leaves(products), jnp.zeros([]))
