"""Matrices with all singular values made equal: the direction of a spectral drift."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._roles import bias_shapes
from wnn_jax._trees import map_where_they_are, wide_dtype

# The `a, b, c` of each step `s -> a s + b s^3 + c s^5` for every singular value `s` in [0, 1]. These four steps bring
# all values from 3e-3 to 1 as near to 1 as four steps can (Amsel et al., `The Polar Express`, 2025; fitted in
# `benchmarks/spectral.py`). More steps are more exact, and gain nothing in training.
COEFFICIENTS = (
    (8.3007, -24.0375, 17.4661),
    (4.0034, -2.9228, 0.5419),
    (3.4709, -2.5494, 0.5002),
    (2.4655, -1.7803, 0.4156),
)
# The most weights of matrices that are computed at a time, which bounds the temporary memory.
_MAX_WEIGHTS = 2**23


def orthogonalize(
    tree: Any, roles: Any, *, coefficients: Sequence[Sequence[float]] = COEFFICIENTS, max_rows: int | None = None
) -> Any:
    """Make all singular values of every matrix in a tree nearly equal, and keep its Frobenius norm.

    A matrix becomes a multiple of its polar factor, the nearest matrix with orthonormal rows or columns. A matrix with
    more than `max_rows` rows and columns is cut into blocks, along the shorter side, and each block is a matrix of its
    own. Each shard is a matrix of its own, too, so that nothing moves between devices.

    `coefficients` are the `(a, b, c)` of each step of the iteration. `matrix_axes` says which leaves are matrices.
    """
    leaves, treedef = jax.tree.flatten(tree)
    described = zip(jax.tree.leaves(roles), leaves, bias_shapes(tree), strict=True)
    axes = {index: matrix_axes(role, jnp.shape(leaf), bias) for index, (role, leaf, bias) in enumerate(described)}
    axes = {index: split for index, split in axes.items() if split is not None}
    splits = list(axes.values())
    orthogonal = map_where_they_are(
        lambda chosen: functools.partial(_map_shards, [splits[position] for position in chosen], max_rows),
        [(jnp.asarray(leaves[index]),) for index in axes],
        jnp.asarray(coefficients),
    )
    for index, leaf in zip(axes, orthogonal, strict=True):
        leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)


def matrix_axes(role: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[int, int] | None:
    """Return `(start, stop)`: axes from `start` to `stop` are a matrix's rows, later ones its columns; `None` for none.

    Axes before `start` count matrices. The columns are the outputs, which have the axes of the bias if there is one. So
    an attention kernel `[d_model, heads, head_dim]` with the bias `[heads, head_dim]` is one matrix of `d_model` rows,
    and a scanned layer's `[layers, in, out]` with the bias `[layers, out]` is one matrix per layer. Equinox has the
    outputs first: `[out, in, height, width]` with the bias `[out, 1, 1]`. Other leaves have them in the last axis.
    """
    rank = len(shape)
    if role not in ("conv", "dense") or rank < 2:
        return None
    if bias is not None and len(bias) < rank:
        num_inputs = rank - len(bias)
        for start in range(len(bias)):
            stop = start + num_inputs
            if shape[:start] + shape[stop:] == bias:
                return start, stop
        if math.prod(bias) == shape[0] != shape[-1]:
            return 0, 1
    return 0, rank - 1


def _map_shards(axes: Any, max_rows: int | None, leaves: Any, coefficients: Any, mesh_axes: Any) -> list[jax.Array]:
    """Orthogonalise leaves with these `matrix_axes`, or one device's shards of them."""
    del mesh_axes
    mapped = [leaf for (leaf,) in leaves]
    # Blocks of one shape are stacked, so that the program does not grow with the number of leaves.
    by_shape: dict[Any, list[tuple[int, jax.Array]]] = {}
    for index, leaf in enumerate(mapped):
        # A matrix of one row is its own polar factor.
        if leaf.size > 0 and min(_matrix_shape(leaf.shape, axes[index])[1:]) > 1:
            blocks = _to_blocks(leaf, axes[index], max_rows)
            by_shape.setdefault((blocks.dtype, blocks.shape[1:]), []).append((index, blocks))
    for group in by_shape.values():
        factors = _polar_by_slices(jnp.concatenate([blocks for _, blocks in group]), coefficients)
        start = 0
        for index, blocks in group:
            end = start + len(blocks)
            mapped[index] = _from_blocks(factors[start:end], mapped[index], axes[index])
            start = end
    return mapped


def _matrix_shape(shape: tuple[int, ...], axes: tuple[int, int]) -> tuple[int, int, int]:
    start, stop = axes
    return math.prod(shape[:start]), math.prod(shape[start:stop]), math.prod(shape[stop:])


def _to_blocks(leaf: jax.Array, axes: tuple[int, int], max_rows: int | None) -> jax.Array:
    """Return the blocks of a leaf's matrices, `[blocks, rows, columns]`, transposed so that no block is high."""
    matrices = leaf.reshape(_matrix_shape(leaf.shape, axes)).astype(wide_dtype(leaf))
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    _, rows, columns = matrices.shape
    num_blocks = -(-rows // (max_rows or rows))
    block_rows = -(-rows // num_blocks)
    # Rows of zeros do not change the others.
    matrices = jnp.pad(matrices, ((0, 0), (0, num_blocks * block_rows - rows), (0, 0)))
    return matrices.reshape(-1, block_rows, columns)


def _from_blocks(blocks: jax.Array, leaf: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Return the leaf whose blocks these are, of the shape and dtype of `leaf`."""
    number, rows, columns = _matrix_shape(leaf.shape, axes)
    matrices = blocks.reshape(number, -1, max(rows, columns))[:, : min(rows, columns)]
    if rows > columns:
        matrices = matrices.mT
    return matrices.reshape(leaf.shape).astype(leaf.dtype)


def _polar_by_slices(matrices: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Do what `polar` does, one slice of the matrices at a time."""
    number, rows, columns = matrices.shape
    num_slices = -(-number // max(_MAX_WEIGHTS // (rows * columns), 1))
    if num_slices == 1:
        return polar(matrices, coefficients)
    slice_size = -(-number // num_slices)
    padded = jnp.pad(matrices, ((0, num_slices * slice_size - number), (0, 0), (0, 0)))

    def replace_slice(index: Any, matrices: jax.Array) -> jax.Array:
        chosen = jax.lax.dynamic_slice_in_dim(matrices, index * slice_size, slice_size)
        return jax.lax.dynamic_update_slice_in_dim(matrices, polar(chosen, coefficients), index * slice_size, axis=0)

    return jax.lax.fori_loop(0, num_slices, replace_slice, padded)[:number]


def polar(matrices: jax.Array, coefficients: Any) -> jax.Array:
    """Return the polar factors of matrices, scaled to the matrices' Frobenius norms, by Newton-Schulz iteration.

    The matrices are `[n, rows, columns]`, at least float32, with no more rows than columns; the coefficients `[steps,
    3]`. A step is :math:`X' = P X` with :math:`P = a I + b G + c G^2` and :math:`G = X X^T`. Matrices much wider than
    high need the first :math:`G` only: :math:`G' = P G P`, and at the end the product of all :math:`P` times the first
    :math:`X`. A matrix of zeros stays.
    """
    coefficients = jnp.asarray(coefficients).astype(matrices.dtype)
    _, rows, columns = matrices.shape
    # Multiply-adds of a matrix: 2 r^2 c + r^3 a step; or 2 r^2 c in all, and 4 r^3 for each step but the first.
    only_gram = 2 * columns > 3 * rows
    # Scaled before squaring, which might overflow.
    scale = _one_if_zero(jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True))
    matrices = matrices / scale
    gram = _multiply(matrices, matrices.mT)
    norm = _norm(matrices)
    # At least the largest singular value, and a tighter bound than the norm of the matrix.
    bound = _one_if_zero(jnp.sqrt(_norm(gram)))
    unit = matrices / bound
    gram = gram / bound**2

    def polynomial(gram: jax.Array, coefficients: jax.Array) -> jax.Array:
        a, b, c = coefficients
        return a * jnp.eye(rows, dtype=gram.dtype)[None] + b * gram + c * _multiply(gram, gram)

    factor = polynomial(gram, coefficients[0])
    product = factor if only_gram else _multiply(factor, unit)

    def step(carry: tuple[jax.Array, ...], coefficients: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        product, gram, factor = carry
        gram = _multiply(_multiply(factor, gram), factor) if only_gram else _multiply(product, product.mT)
        factor = polynomial(gram, coefficients)
        return (_multiply(factor, product), gram, factor), None

    (product, _, _), _ = jax.lax.scan(step, (product, gram, factor), coefficients[1:])
    factors = _multiply(product, unit) if only_gram else product
    return factors * (norm / _one_if_zero(_norm(factors))) * scale


_norm = functools.partial(jnp.linalg.matrix_norm, keepdims=True)


def _multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _one_if_zero(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, values, 1)
