"""The neural graph of a model: its neurons as nodes, and an edge for every weight between two of them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.nowcasters.nino._laplacian import Link, laplacian_eigenvectors

# What an edge is, as rows of the published embedding.
KINDS: Mapping[str, int] = {
    "dense": 1,
    "bias": 2,
    "conv": 3,
    "norm": 4,
    "embedding": 5,
    "position": 6,
    "query": 7,
    "key": 8,
    "value": 9,
    "residual": 10,
    "head": 11,
    "self": 13,
}
NUM_KINDS = 15
# How many numbers tell the place of a node.
NUM_POSITIONS = 8
# How many elements of the window of a convolution an edge has at most. A larger window is cut into several edges.
MAX_WINDOW = 9

# The names of the parts of attention, as linen, nnx and Equinox have them. A layer of one of the fused names has queries,
# keys and values in one, in this order; its projection back has other names too.
OUT, FUSED = ("out", "output_proj"), ("c_attn", "qkv")
PARTS: Mapping[str, Sequence[str]] = {
    **{name: (name, f"{name}_proj") for name in ("query", "key", "value")},
    "out": (*OUT, "c_proj", "proj"),
}


class Layout(NamedTuple):
    """The axes of a tensor, read as a matrix of windows. A tensor without rows has one row.

    Attributes:
      window: the axes of the window of a convolution.
      rows: those of what comes in, of a kernel as Flax has it.
      columns: those of what goes out.
    """

    window: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def is_output_first(self) -> bool:
        """Whether what goes out comes before what comes in, as in Equinox."""
        return bool(self.rows) and self.columns < self.rows

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many elements a window has, and how many rows and columns there are."""
        window, rows, columns = (math.prod(shape[axis] for axis in axes) for axes in self)
        return window, rows, columns

    def cuts(self, shape: Sequence[int]) -> list[slice]:
        """The elements of the window that an edge has, for each of the edges between two neurons."""
        window = self.sizes(shape)[0]
        return [slice(start, min(start + MAX_WINDOW, window)) for start in range(0, window, MAX_WINDOW)]

    def to_matrix(self, leaf: Any) -> Any:
        """`[window, rows * columns]`, of a NumPy or a JAX array."""
        window, rows, columns = self.sizes(leaf.shape)
        return leaf.transpose(*self.window, *self.rows, *self.columns).reshape(window, rows * columns)

    def from_matrix(self, matrix: Any, shape: Sequence[int]) -> Any:
        """The tensor, from what `to_matrix` made of it."""
        order = (*self.window, *self.rows, *self.columns)
        return matrix.reshape([shape[axis] for axis in order]).transpose(*np.argsort(order))


def layout_of(names: Sequence[str], shape: Sequence[int], role: str) -> Layout:
    """Reads the axes of a tensor from its name, rank and role.

    Args:
      names: along its path, in lower case.
      shape: its shape.
      role: its role.
    """
    axes = tuple(range(len(shape)))
    if role in ("bias", "norm") or len(shape) < 2:
        return Layout((), (), axes)
    if role == "embedding":
        return Layout((), axes[:-1], axes[-1:])
    if names[-1:] == ("weight",):
        return Layout(axes[2:], axes[1:2], axes[:1])
    if role == "conv":
        return Layout(axes[:-2], axes[-2:-1], axes[-1:])
    if len(shape) > 2 and names[-2:-1] and names[-2] in OUT:
        return Layout((), axes[:-1], axes[-1:])
    return Layout((), axes[:1], axes[1:])


class Ends(NamedTuple):
    """Where the edges of a tensor begin and end. Its rows and its columns belong to nodes that follow one another.

    All are ints; or arrays of them, for edges of several tensors.

    Attributes:
      first_row: the node of the first row.
      num_row_nodes: how many nodes the rows belong to. There are more rows where the positions of an image were
        flattened: each channel is one node then.
      row_repeats: how many rows in a row belong to one node.
      first_column: the node of the first column.
      num_columns: how many columns there are.
      is_diagonal: whether every column has a row of its own, as where the channels of a convolution are not mixed.
      is_reversed: whether the edges lead from columns to rows.
    """

    first_row: Any
    num_row_nodes: Any
    row_repeats: Any
    first_column: Any
    num_columns: Any
    is_diagonal: Any = False
    is_reversed: Any = False

    def at(self, position: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """The source and the target of edges.

        Args:
          position: `[n]`, places in the matrix of the tensor, row by row.
          xp: NumPy or `jax.numpy`.
        """
        row, column = position // self.num_columns, position % self.num_columns
        place = xp.where(self.is_diagonal, column, row) // self.row_repeats % self.num_row_nodes
        row, column = self.first_row + place, self.first_column + column
        return xp.where(self.is_reversed, column, row), xp.where(self.is_reversed, row, column)


class Block(NamedTuple):
    """The edges of one tensor, for every place in its matrix one, or one for each cut of the window.

    Attributes:
      kind: what its edges are.
      layout: how the tensor is read as a matrix.
      ends: where they begin and end.
    """

    kind: int
    layout: Layout
    ends: Ends


class Piece(NamedTuple):
    """Where a tensor of the graph is: a leaf of the parameters, or a slice of one.

    Attributes:
      leaf: the number of the leaf.
      axis: that of the slice, or `None` for the whole leaf.
      start: where the slice begins.
      stop: where it ends.
    """

    leaf: int
    axis: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, leaf: Any) -> Any:
        """The tensor, of its leaf, a NumPy or a JAX array."""
        return leaf if self.axis is None else leaf[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    def put(self, leaf: jax.Array, tensor: jax.Array) -> jax.Array:
        """The leaf with another tensor in its place."""
        if self.axis is None:
            return tensor
        return jax.lax.dynamic_update_slice_in_dim(leaf, tensor, self.start, axis=self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A neural graph.

    Attributes:
      num_nodes: how many nodes there are.
      pieces: where each tensor is, in the order of the leaves.
      blocks: the edges of each tensor, in the same order.
      links: what is connected, by tensors or otherwise, without the loops from each node to itself.
      sources: of the edges that no tensor has: residual connections, heads, and loops.
      targets: of the same.
      kinds: of the same.
      degrees: `[num_nodes]`, how many edges lead to each node.
      given_positions: `[num_nodes, 8]`, the place of each node, or `None`.
    """

    num_nodes: int
    pieces: tuple[Piece, ...]
    blocks: tuple[Block, ...]
    links: tuple[Link, ...]
    sources: np.ndarray
    targets: np.ndarray
    kinds: np.ndarray
    degrees: np.ndarray
    given_positions: np.ndarray | None

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """`[num_nodes, 8]` in float32, the place of each node: as given, or eigenvectors of the Laplacian."""
        if self.given_positions is not None:
            return self.given_positions
        return laplacian_eigenvectors(self.links, self.num_nodes, NUM_POSITIONS)


class Tensor(NamedTuple):
    """What a graph is built from: one leaf of the parameters, or a part of one.

    Attributes:
      path: its path, with slashes.
      names: along its path, in lower case, with the classes of modules where these are known.
      shape: its shape.
      role: its role.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    role: str
