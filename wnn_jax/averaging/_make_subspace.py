"""The subspace that checkpoints span, made without holding all of them."""

import functools
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_choice
from wnn_jax._trees import following, norm, wide_dtype
from wnn_jax._trees import norms as norms_of
from wnn_jax.averaging._dependence import distance, independent, narrowest_dtype, sketch
from wnn_jax.averaging._means import toward
from wnn_jax.averaging._packing import BITS, pack
from wnn_jax.averaging._subspace import Subspace


def make_subspace(
    checkpoints: Iterable[Any], *, form: Literal["deltas", "orthonormal"] = "deltas", bits: int | None = None
) -> Subspace:
    """The subspace of the weights that averages of checkpoints are in.

    Goes through the checkpoints twice, and holds two of them at most beside what it returns, and the directions of one
    and a few copies of the largest tensor while it works. So checkpoints that are loaded one at a time, as a
    `WeightHistory` on disk does it, need never be in memory all at once.

    Args:
      checkpoints: trees like the parameters, oldest first; a `WeightHistory`, a list, or anything else that can be gone
        through twice, and has the same in it each time.
      form: `"deltas"` for the form of the paper in its journal: coefficients per checkpoint and tensor, of the
        distances from the uniform average. `"orthonormal"` for that of the conference: coefficients of an orthonormal
        basis of whole weights, the same for all tensors.
      bits: 1, 2, 4 or 8, to keep the distances in so many bits a number; for `"deltas"` only. `None`: as they are.

    Returns:
      A `Subspace`.

    Raises:
      ValueError: if there are fewer than 2 checkpoints, if they can be gone through only once, if they differ in
        structure, shapes or dtypes, if one has a value that is not finite, if they are all the same or too far from one
        another for their dtype, if the last is zero and the form is `"orthonormal"`, or if an argument is unknown.

    Warns:
      UserWarning: if checkpoints depend on others linearly, as some thousand random sums of their weights show. They
        are left out as directions, though not of the mean.

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
            f"checkpoints={checkpoints!r} can be gone through once, and twice is needed; give a list, a WeightHistory, "
            "or an object whose __iter__ begins anew."
        )
    number, mean, last = _survey(checkpoints)
    directions, norms, sketches, sizes = _gather(checkpoints, number, mean, last, form, bits)
    if not sizes[: number - 1].any():
        raise ValueError("checkpoints are all the same; an average of them is any of them.")
    if not sizes[number - 1 :].all():
        raise ValueError("checkpoints[-1] is zero, and has no direction; leave it out, or pass form='deltas'.")
    with np.errstate(over="ignore", invalid="ignore"):
        _check_lengths(sizes * np.linalg.norm(sketches, axis=1), mean)
    # The last comes first, because what the others are without it is what they add to it.
    chosen = independent(sketches, first=range(number - 1, len(sketches)))
    left_out = sorted(set(range(len(sketches))) - set(chosen))
    if left_out:
        warnings.warn(
            f"checkpoints {left_out} depend linearly on the others, and are left out as directions.", stacklevel=2
        )
        kept = np.setdiff1d(np.arange(number), left_out)
        directions, norms = jax.tree.map(lambda leaf: leaf[kept], (directions, norms))
    size = number - len(left_out)
    mixing = jnp.eye(size) if form == "deltas" else _inverse_cholesky(_cosines(directions))
    shards = tuple(_num_shards(leaf) for leaf in jax.tree.leaves(mean))
    return Subspace(mean, directions, norms, mixing, form, bits, shards)


def _survey(checkpoints: Iterable[Any]) -> tuple[int, Any, Any]:
    """Goes through checkpoints once: how many they are, their mean, in float32 or wider, and the last.

    Raises:
      ValueError: if they cannot be averaged.
    """
    expected: dict[str, str] = {}
    mean: Any = None
    last: Any = None
    number = 0
    for tree in checkpoints:
        expected = expected or _describe(tree)
        _check(tree, number, expected)
        if number == 0:
            mean = jax.tree.map(lambda leaf: jnp.array(leaf, wide_dtype(leaf)), tree)
        else:
            mean = _add_to_mean(mean, tree, 1 / (number + 1))
        number += 1
        last = tree
    if number < 2:
        raise ValueError(f"checkpoints has {number} of them; give at least 2, or there is nothing to average.")
    return number, mean, last


def _gather(
    checkpoints: Iterable[Any], number: int, mean: Any, last: Any, form: str, bits: int | None
) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Goes through checkpoints again, and makes their directions.

    Args:
      checkpoints: as before.
      number: how many they were.
      mean: of all.
      last: of them.
      form: as for `make_subspace`.
      bits: as for `make_subspace`.

    Returns:
      The directions and their norms, as in `Subspace`; and sketches `[checkpoints, sums]` and their sizes
      `[checkpoints]`, in float64, of the distances from the last, and in the orthonormal form of that one.
    """
    kept: Any = None
    sketches: list[Any] = []
    index = 0
    # Without `enumerate`, which would hold one checkpoint while the next is loaded.
    for tree in checkpoints:
        origin = last if index < number - 1 else None
        if origin is not None or form == "orthonormal":
            sketches.append(jax.device_get(sketch(tree, origin)))
        one = _delta(tree, mean, bits) if form == "deltas" else _whole(tree, origin)
        kept = _make_room(one, number) if index == 0 else _write(kept, one, index)
        index += 1
        del one, tree
        if index > number:
            break
    if index != number:
        raise ValueError(
            f"checkpoints had {number} of them, and other ones when gone through again; let none be added."
        )
    sums, sizes = (np.stack(values).astype(np.float64) for values in zip(*sketches, strict=True))
    return *kept, sums, sizes


@functools.partial(jax.jit, donate_argnums=0)
def _add_to_mean(mean: Any, tree: Any, share: Any) -> Any:
    return jax.tree.map(lambda mean, leaf: toward(mean, leaf, share), mean, tree)


@functools.partial(jax.jit, static_argnames="bits")
def _delta(tree: Any, mean: Any, bits: int | None) -> tuple[Any, Any]:
    """The distance from the mean, each tensor divided by its norm; and the norms."""
    leaves, treedef = jax.tree.flatten(distance(tree, mean))
    directions: list[Any] = []
    norms: list[jax.Array] = []
    for leaf in leaves:
        # One tensor after the other, in the same memory.
        delta = following(norms[-1], leaf, leaf) if norms else leaf
        norms.append(_or_one(norm(delta)))
        direction = delta / norms[-1]
        directions.append(direction if bits is None else pack(direction, bits))
    return jax.tree.unflatten(treedef, directions), jax.tree.unflatten(treedef, norms)


@jax.jit
def _whole(tree: Any, origin: Any) -> tuple[Any, Any]:
    """The distance from another tree, or from zero, divided by its norm as a whole; and that norm, for each tensor."""
    move = distance(tree, origin)
    length = norm(norms_of(move))
    norms = jax.tree.map(lambda leaf: length.astype(leaf.dtype), move)
    return jax.tree.map(jnp.divide, move, norms), norms


@functools.partial(jax.jit, static_argnames="size")
def _make_room(one: Any, size: int) -> Any:
    """An array with room for `size` of each, sharded alike, with the first one in it."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (size, *leaf.shape)), one)


@functools.partial(jax.jit, donate_argnums=0)
def _write(kept: Any, one: Any, slot: Any) -> Any:
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), kept, one)


@jax.jit
def _cosines(directions: Any) -> jax.Array:
    """The inner products of all directions, by elementwise products, so that sharded weights stay where they are."""

    def products(leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1, leaf.ndim))
        return jax.lax.map(lambda one: jnp.sum(leaf * one[None], axis=axes), leaf)

    return sum(jax.tree.leaves(jax.tree.map(products, directions)), jnp.zeros([]))


def _check_lengths(lengths: np.ndarray, mean: Any) -> None:
    dtype = narrowest_dtype(mean)
    # With room for the distances from the mean, and for sums of a few.
    limit = float(jnp.finfo(dtype).max) / 16
    if not (lengths < limit).all():
        raise ValueError(
            f"checkpoints are too far from one another or from zero: {dtype} has room for distances up to {limit:.1e}. "
            "Leave out those that have diverged."
        )


def _inverse_cholesky(cosines: jax.Array) -> jax.Array:
    """`c`, so that `c @ cosines @ c.T` is the identity."""
    inverse = np.linalg.inv(np.linalg.cholesky(np.asarray(cosines, np.float64)))
    return jnp.asarray(inverse, cosines.dtype)


def _num_shards(leaf: jax.Array) -> tuple[int, ...]:
    shard = leaf.sharding.shard_shape(leaf.shape)
    return tuple(max(size, 1) // max(part, 1) for size, part in zip(leaf.shape, shard, strict=True))


def _or_one(norms: jax.Array) -> jax.Array:
    # A tensor that is the same in all checkpoints has no direction.
    return jnp.where(norms > 0, norms, 1.0)


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{jnp.shape(leaf)}" for path, leaf in leaves}


def _check(tree: Any, index: int, expected: dict[str, str]) -> None:
    found = _describe(tree)
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
