"""The subspace that checkpoints span, computed without holding all checkpoints in memory."""

import functools
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_choice
from wnn_jax._trees import difference, following, norm, norms, wide_dtype
from wnn_jax.averaging._means import toward
from wnn_jax.averaging._packing import BITS, pack
from wnn_jax.averaging._subspace import Subspace


def make_subspace(
    checkpoints: Iterable[Any], *, form: Literal["deltas", "orthonormal"] = "deltas", bits: int | None = None
) -> Subspace:
    """Return the `Subspace` of the weights that contains all averages of some checkpoints.

    Checkpoints are read twice, one at a time. Apart from the result, memory holds at most two checkpoints, the
    directions of one, and a few copies of the largest tensor. So a `WeightHistory` on disk never fills the memory.

    Args:
      checkpoints: trees like the parameters, oldest first: a `WeightHistory`, a list, or anything else that can be
        iterated over twice with the same result.
      form: `"deltas"` for the form of the journal paper: coefficients for each checkpoint and tensor, of differences
        from the uniform average. `"orthonormal"` for the form of the conference paper: coefficients of an orthonormal
        basis of whole weights, the same for all tensors.
      bits: 1, 2, 4 or 8, to keep the differences in so many bits a number, for `"deltas"` only. `None` keeps them in
        full.

    Raises:
      ValueError: if there are fewer than 2 checkpoints, or they can be iterated over only once; if they differ in
        structure, shapes or dtypes, are all the same, or are too far from one another for their dtype; if one has a
        value that is not finite; if the last is zero for `"orthonormal"`; if an argument is unknown.

    Warns:
      UserWarning: if the form is `"orthonormal"` and some checkpoints depend linearly on others. They are left out as
        directions, but still count in the mean.

    References:
      Li et al., `Trainable Weight Averaging: A General Approach for Subspace Training
      <https://arxiv.org/abs/2205.13104>`_: ICLR 2023 for `"orthonormal"`, 2025 for `"deltas"` and few bits
    """
    form = check_choice("form", form, ("deltas", "orthonormal"), "what the coefficients are of")
    if bits is not None:
        bits = check_choice("bits", bits, BITS, "the bits of a number in the directions, or None for all")
        if form != "deltas":
            raise ValueError(f"bits={bits} must be None for form={form!r}; only form='deltas' can be kept in few bits.")
    if iter(checkpoints) is checkpoints:
        raise ValueError(
            f"checkpoints={checkpoints!r} can be iterated over once, and twice is needed; give a list, a "
            "WeightHistory, or an object whose __iter__ starts again."
        )
    number, mean, last = _survey(checkpoints)
    directions, lengths = _gather(checkpoints, number, mean, last, form, bits)
    _check_lengths(lengths, number, form)
    lengths = jax.tree.map(_one_if_zero, lengths)
    mixing = jnp.eye(number)
    if form == "orthonormal":
        cosines = _cosines(directions)
        gram = np.asarray(cosines, np.float64)
        chosen = _independent(gram)
        if left_out := sorted(set(range(number)) - set(chosen)):
            message = f"checkpoints {left_out} depend linearly on the others, and are left out as directions."
            warnings.warn(message, stacklevel=2)
            directions, lengths = jax.tree.map(lambda leaf: leaf[np.array(chosen)], (directions, lengths))
        mixing = jnp.asarray(np.linalg.inv(np.linalg.cholesky(gram[np.ix_(chosen, chosen)])), cosines.dtype)
    shards = tuple(map(_num_shards, jax.tree.leaves(mean)))
    return Subspace(mean, directions, lengths, mixing, form, bits, shards)


def _survey(checkpoints: Iterable[Any]) -> tuple[int, Any, Any]:
    """Read all checkpoints once, and return their number, their mean in float32 or wider, and the last one."""
    expected: dict[str, str] = {}
    mean, last, number = None, None, 0
    for last in checkpoints:
        expected = _checked(last, number, expected)
        if number == 0:
            mean = jax.tree.map(lambda leaf: jnp.array(leaf, wide_dtype(leaf)), last)
        else:
            mean = _add_to_mean(mean, last, 1 / (number + 1))
        number += 1
    if number < 2:
        raise ValueError(f"checkpoints has {number} of them; give at least 2, or there is nothing to average.")
    return number, mean, last


def _gather(
    checkpoints: Iterable[Any], number: int, mean: Any, last: Any, form: str, bits: int | None
) -> tuple[Any, Any]:
    """Read all checkpoints again, and return their directions, and the lengths by which these were divided."""
    kept, index = None, 0
    # Without `enumerate`, which would hold one checkpoint while the next is loaded.
    for tree in checkpoints:
        origin = None if index == number - 1 else last
        one = _delta(tree, mean, bits) if form == "deltas" else _whole(tree, origin)
        kept = _write(kept, one, index, number)
        index += 1
        del one, tree
        if index > number:
            break
    if kept is None or index != number:
        raise ValueError(
            f"checkpoints had {number} of them, and another number when iterated over again; let none be added."
        )
    return kept


@functools.partial(jax.jit, donate_argnums=0)
def _add_to_mean(mean: Any, tree: Any, share: Any) -> Any:
    return jax.tree.map(lambda mean, leaf: toward(mean, leaf, share), mean, tree)


@functools.partial(jax.jit, static_argnames="bits")
def _delta(tree: Any, mean: Any, bits: int | None) -> tuple[Any, Any]:
    """Return the difference from the mean, each tensor divided by its norm, and the norms."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(difference, tree, mean))
    directions: list[Any] = []
    lengths: list[jax.Array] = []
    for leaf in leaves:
        # One tensor at a time: with 4 bits, 8 tensors take 2 copies of one instead of 16.
        delta = following(lengths[-1], leaf, leaf) if lengths else leaf
        lengths.append(norm(delta))
        direction = delta / _one_if_zero(lengths[-1])
        directions.append(direction if bits is None else pack(direction, bits))
    return jax.tree.unflatten(treedef, directions), jax.tree.unflatten(treedef, lengths)


@jax.jit
def _whole(tree: Any, origin: Any) -> tuple[Any, Any]:
    """Return the difference from another tree, or from zero, divided by its norm, and that norm for each tensor."""
    wide = jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), tree)
    move = wide if origin is None else jax.tree.map(difference, wide, origin)
    length = norm(norms(move))
    lengths = jax.tree.map(lambda leaf: length.astype(leaf.dtype), move)
    return jax.tree.map(lambda leaf, length: leaf / _one_if_zero(length), move, lengths), lengths


@functools.partial(jax.jit, donate_argnums=0, static_argnames="size")
def _write(kept: Any, one: Any, slot: Any, size: int) -> Any:
    """Put a tree into one of `size` slots of trees. The first call makes them, sharded like the tree."""
    if kept is None:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (size, *leaf.shape)), one)
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), kept, one)


@jax.jit
def _cosines(directions: Any) -> jax.Array:
    """Return the inner products `[n, n]` of all directions, elementwise, so that no shard moves."""

    def products(leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1, leaf.ndim))
        return jax.lax.map(lambda one: jnp.sum(leaf * one[None], axis=axes), leaf)

    return sum(jax.tree.leaves(jax.tree.map(products, directions)), jnp.zeros([]))


def _independent(cosines: np.ndarray) -> list[int]:
    """Return in order which directions span the space of all, by Cholesky's method with pivots.

    The last checkpoint, which is the last direction, comes first. The others are judged by what they add to it.
    """
    left = cosines.copy()
    chosen: list[int] = []
    while len(chosen) < len(left):
        pivot = int(np.argmax(np.diag(left))) if chosen else len(left) - 1
        # A smaller rest may be a rounding error of float32 sums of squares.
        if left[pivot, pivot] <= 1e-6:
            break
        chosen.append(pivot)
        column = left[:, pivot] / np.sqrt(left[pivot, pivot])
        left -= np.outer(column, column)
        left[pivot] = left[:, pivot] = 0
    return sorted(chosen)


def _check_lengths(lengths: Any, number: int, form: str) -> None:
    """Refuse checkpoints without a direction, or too far apart."""
    values = np.array([np.asarray(leaf) for leaf in jax.tree.leaves(lengths)], np.float64).reshape(-1, number)
    if not (values if form == "deltas" else values[:, :-1]).any():
        raise ValueError("checkpoints are all the same; an average of them is any of them.")
    if form == "orthonormal" and not values[:, -1].all():
        raise ValueError("checkpoints[-1] is zero, and has no direction; leave it out, or pass form='deltas'.")
    for leaf in jax.tree.leaves(lengths):
        limit = float(jnp.finfo(leaf.dtype).max) / 16  # With room for sums of a few.
        if not (np.asarray(leaf) < limit).all():
            raise ValueError(
                f"checkpoints are too far from one another or from zero: {leaf.dtype} has room for distances up to "
                f"{limit:.1e}. Leave out those that have diverged."
            )


def _num_shards(leaf: jax.Array) -> tuple[int, ...]:
    shard = leaf.sharding.shard_shape(leaf.shape)
    return tuple(max(size, 1) // max(part, 1) for size, part in zip(leaf.shape, shard, strict=True))


def _one_if_zero(lengths: jax.Array) -> jax.Array:
    # A tensor that is the same in all checkpoints has no direction.
    return jnp.where(lengths > 0, lengths, 1.0)


def _checked(tree: Any, index: int, expected: dict[str, str]) -> dict[str, str]:
    """Return the dtype and shape of each leaf of a finite checkpoint. They must be as expected, if anything is."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    actual = {path: f"{jnp.result_type(leaf)}{jnp.shape(leaf)}" for path, leaf in leaves.items()}
    for path in [*expected, *actual] if expected else []:
        if expected.get(path) != actual.get(path):
            raise ValueError(
                f"checkpoints[{index}] has {actual.get(path, 'nothing')} at {path or 'its root'}, where "
                f"checkpoints[0] has {expected.get(path, 'nothing')}; give checkpoints of one model."
            )
    for path, leaf in leaves.items():
        if not jnp.isfinite(leaf).all():
            raise ValueError(
                f"checkpoints[{index}] has a value that is not finite at {path}; leave that checkpoint out."
            )
    return actual
