"""Trainable weight averaging (TWA): training in the subspace that checkpoints span."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax._checks import check_choice
from wnn_jax._history import wide_dtype
from wnn_jax._norm import norms as norms_of
from wnn_jax.averaging._means import mean_of
from wnn_jax.averaging._packing import BITS, Packed, pack, unpack_one

Coefficients = Any

# On accelerators the default rounds the factors, which are weights here, to fewer bits than they have.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_tensordot = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "directions", "norms", "mixing"],
    meta_fields=["form", "bits"],
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
    """

    mean: Any
    directions: Any
    norms: Any
    mixing: jax.Array
    form: Literal["deltas", "orthonormal"]
    bits: int | None

    @property
    def size(self) -> int:
        """How many directions there are."""
        return self.mixing.shape[0]


def make_subspace(
    checkpoints: Iterable[Any], *, form: Literal["deltas", "orthonormal"] = "deltas", bits: int | None = None
) -> Subspace:
    """The subspace of the weights that averages of checkpoints are in.

    Args:
      checkpoints: trees like the parameters, oldest first; a `WeightHistory`, for instance.
      form: `"deltas"` for the form of the paper in its journal: coefficients per checkpoint and tensor, of the
        distances from the uniform average. `"orthonormal"` for that of the conference: coefficients of an orthonormal
        basis of whole weights, the same for all tensors.
      bits: 1, 2, 4 or 8, to keep the distances in so many bits a number; for `"deltas"` only. `None`: as they are.

    Returns:
      A `Subspace`.

    Raises:
      ValueError: if there are fewer than 2 checkpoints, if they differ in structure, shapes or dtypes, if one has a
        value that is not finite, if they are all the same or too far from one another for their dtype, if the last is
        zero and the form is `"orthonormal"`, or if an argument is unknown.

    Warns:
      UserWarning: if checkpoints depend on others linearly. They are left out as directions, though not of the mean.

    References:
      Li et al., `Trainable Weight Averaging: A General Approach for Subspace Training
      <https://arxiv.org/abs/2205.13104>`_: ICLR 2023 for `"orthonormal"`, 2025 for `"deltas"` and few bits
    """
    form = check_choice("form", form, ("deltas", "orthonormal"), "what the coefficients are of")
    if bits is not None:
        bits = check_choice("bits", bits, BITS, "the bits of a number in the directions, or None for all")
        if form != "deltas":
            raise ValueError(f"bits={bits} must be None for form={form!r}; only form='deltas' can be kept in few bits.")
    trees = list(checkpoints)
    _check_checkpoints(trees)
    wide = [jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), tree) for tree in trees]
    mean = _mean(wide)
    # Of the distances from the last, exact where checkpoints are close to one another, as squares of weights are not.
    last = wide[-1]
    moves = [jax.tree.map(jnp.subtract, tree, last) for tree in wide[:-1]]
    rows = [*moves, last] if form == "orthonormal" else moves
    cosines, lengths = _cosines(rows)
    _check_lengths(lengths, mean)
    if not lengths[: len(moves)].any():
        raise ValueError("checkpoints are all the same; an average of them is any of them.")
    if not lengths[len(moves) :].all():
        raise ValueError("checkpoints[-1] is zero, and has no direction; leave it out, or pass form='deltas'.")
    # The last comes first, because what the others are without it is what they add to it.
    independent = _independent(cosines, first=range(len(moves), len(rows)))
    left_out = sorted(set(range(len(rows))) - set(independent))
    if left_out:
        warnings.warn(
            f"checkpoints {left_out} depend linearly on the others, and are left out as directions.", stacklevel=2
        )
    if form == "orthonormal":
        norms = jax.tree.map(lambda leaf: jnp.asarray(lengths[independent], leaf.dtype), mean)
        chosen = [rows[index] for index in independent]
        directions = jax.tree.map(
            lambda norm, *leaves: jnp.stack(leaves) / _expand(norm, leaves[0].ndim + 1), norms, *chosen
        )
        mixing = _inverse_cholesky(cosines[np.ix_(independent, independent)])
        return Subspace(
            mean, directions, norms, jnp.asarray(mixing, jnp.result_type(*jax.tree.leaves(mean))), form, None
        )
    chosen = [*(wide[index] for index in independent), last]
    directions, norms = _deltas(chosen, mean)
    if bits is not None:
        directions = jax.tree.map(lambda leaf: pack(leaf, bits), directions)
    return Subspace(mean, directions, norms, jnp.eye(len(chosen)), form, bits)


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
        lambda mean, packed, x: _add_packed(mean, packed, x, subspace.bits or 0),
        subspace.mean,
        subspace.directions,
        coefficients,
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


def _add_packed(mean: jax.Array, packed: Packed, coefficients: jax.Array, bits: int) -> jax.Array:
    # One checkpoint at a time, and in the backward pass again, so that never more than one is unpacked.
    @jax.checkpoint
    def add(total: jax.Array, one: tuple[Packed, jax.Array]) -> tuple[jax.Array, None]:
        direction, coefficient = one
        return total + coefficient * unpack_one(direction, bits, mean.shape), None

    return jax.lax.scan(add, mean, (packed, coefficients))[0]


def _project(directions: Any, tree: Any) -> jax.Array:
    """The inner products of the directions with weights."""
    products = jax.tree.map(
        lambda leaf, other: _tensordot(leaf.reshape(len(leaf), -1), other.reshape(-1)),
        directions,
        tree,
    )
    return sum(jax.tree.leaves(products), jnp.zeros([]))


@jax.jit
def _mean(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: mean_of(leaves), *trees)


@jax.jit
def _deltas(trees: Sequence[Any], mean: Any) -> tuple[Any, Any]:
    """The distances of trees from their mean, stacked, each tensor divided by its norm; and the norms."""
    stacked = jax.tree.map(lambda mean, *leaves: jnp.stack([leaf - mean for leaf in leaves]), mean, *trees)
    norms = jax.tree.map(lambda leaf: _or_one(norms_of(jnp.unstack(leaf))), stacked)
    return jax.tree.map(lambda leaf, norm: leaf / _expand(norm, leaf.ndim), stacked, norms), norms


def _cosines(trees: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of the angles between trees, 0 where one has no length, and their lengths; in float64."""
    gram, sizes = (np.asarray(values, np.float64) for values in _gram(trees))
    lengths = np.sqrt(np.diag(gram))
    safe = np.where(lengths > 0, lengths, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        return gram / np.outer(safe, safe), sizes * lengths


@jax.jit
def _gram(trees: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """The inner products of all pairs of trees, each divided by its size, about its largest weight; and their sizes.

    By elementwise products, so that sharded weights stay where they are, of which none overflows or vanishes.
    """

    def size(tree: Any) -> jax.Array:
        largest = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]
        limits = jnp.finfo(min((leaf.dtype for leaf in largest), key=lambda dtype: jnp.finfo(dtype).max))
        # Of a larger number the reciprocal, by which a compiler may multiply instead, would vanish.
        return jnp.clip(functools.reduce(jnp.maximum, largest), limits.smallest_normal, limits.max / 8)

    def product(one: Any, other: Any) -> jax.Array:
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)), jnp.zeros([]))

    sizes = [size(tree) for tree in trees]
    scaled = [
        jax.tree.map(lambda leaf, size=size: leaf / size.astype(leaf.dtype), tree)
        for tree, size in zip(trees, sizes, strict=True)
    ]
    return jnp.stack([jnp.stack([product(one, other) for other in scaled]) for one in scaled]), jnp.stack(sizes)


def _check_lengths(lengths: np.ndarray, mean: Any) -> None:
    dtype = min((leaf.dtype for leaf in jax.tree.leaves(mean)), key=lambda dtype: jnp.finfo(dtype).max)
    # With room for the distances from the mean, and for sums of a few.
    limit = float(jnp.finfo(dtype).max) / 16
    if not (lengths < limit).all():
        raise ValueError(
            f"checkpoints are too far from one another or from zero: {dtype} has room for distances up to {limit:.1e}. "
            "Leave out those that have diverged."
        )


def _independent(cosines: np.ndarray, first: Sequence[int]) -> list[int]:
    """Which unit vectors span the space of all, by Cholesky's method with pivots, in their order.

    Args:
      cosines: of the angles between them.
      first: those that are chosen before any other.
    """
    left, waiting = cosines.copy(), list(first)
    chosen: list[int] = []
    while len(chosen) < len(cosines):
        pivot = waiting.pop() if waiting else int(np.argmax(np.diag(left)))
        # What is below the rounding of float32 sums of squares is not to be told from nothing.
        if left[pivot, pivot] <= 1e-6:
            break
        chosen.append(pivot)
        column = left[:, pivot] / np.sqrt(left[pivot, pivot])
        left -= np.outer(column, column)
        left[pivot] = left[:, pivot] = 0
    return sorted(chosen)


def _inverse_cholesky(cosines: np.ndarray) -> np.ndarray:
    """`c`, so that `c @ cosines @ c.T` is the identity."""
    return np.linalg.inv(np.linalg.cholesky(cosines))


def _or_one(norms: jax.Array) -> jax.Array:
    # A tensor that is the same in all checkpoints has no direction.
    return jnp.where(norms > 0, norms, 1.0)


def _expand(values: jax.Array, ndim: int) -> jax.Array:
    return values.reshape(-1, *(1,) * (ndim - 1))


def _check_checkpoints(trees: Sequence[Any]) -> None:
    if len(trees) < 2:
        raise ValueError(f"checkpoints has {len(trees)} of them; give at least 2, or there is nothing to average.")

    def describe(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{jnp.shape(leaf)}" for path, leaf in leaves}

    expected = describe(trees[0])
    for index, tree in enumerate(trees):
        found = describe(tree)
        for path in [*expected, *found]:
            if expected.get(path) != found.get(path):
                raise ValueError(
                    f"checkpoints[{index}] has {found.get(path, 'nothing')} at {path or 'its root'}, where "
                    f"checkpoints[0] has {expected.get(path, 'nothing')}; give checkpoints of one model."
                )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.isfinite(leaf).all():
                raise ValueError(
                    f"checkpoints[{index}] has a value that is not finite at {jax.tree_util.keystr(path)}; leave that "
                    "checkpoint out."
                )
