"""The neural graph of a model: its neurons as nodes, and an edge for every weight between two of them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.nowcasters.nino._laplacian import Link, Span, laplacian_eigenvectors

# What an edge is, as rows of the published embedding.
KINDS: Mapping[str, int] = {
    **{"dense": 1, "bias": 2, "conv": 3, "norm": 4, "embedding": 5, "position": 6, "query": 7, "key": 8, "value": 9},
    **{"residual": 10, "head": 11, "self": 13},
}
NUM_KINDS = 15
# How many numbers tell the place of a node.
NUM_POSITIONS = 8
# The largest number of elements of a convolution's window that one edge holds.
MAX_WINDOW = 9

# The names of the parts of attention in linen, nnx and Equinox. A layer with a fused name holds queries, keys and
# values, in this order.
OUT, FUSED = ("out", "output_proj"), ("c_attn", "qkv")
PARTS: Mapping[str, Sequence[str]] = {
    **{name: (name, f"{name}_proj") for name in ("query", "key", "value")},
    "out": (*OUT, "c_proj", "proj"),
}


class Layout(NamedTuple):
    """How a tensor is a matrix of windows: the axes of the window, of the inputs (none for vectors), of the outputs."""

    window: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def is_output_first(self) -> bool:
        """Whether outputs come before inputs, as in Equinox."""
        return bool(self.rows) and self.columns < self.rows

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Elements of a window, rows and columns. A vector has one row."""
        window, rows, columns = (math.prod(shape[axis] for axis in axes) for axes in self)
        return window, rows, columns

    def cuts(self, shape: Sequence[int]) -> list[slice]:
        """The elements of the window that each of the edges between two neurons holds."""
        window = self.sizes(shape)[0]
        return [slice(start, min(start + MAX_WINDOW, window)) for start in range(0, window, MAX_WINDOW)]

    def to_matrix(self, leaf: Any) -> Any:
        """`[window, rows * columns]`, from a NumPy or a JAX array."""
        window, rows, columns = self.sizes(leaf.shape)
        return leaf.transpose(*self.window, *self.rows, *self.columns).reshape(window, rows * columns)

    def from_matrix(self, matrix: Any, shape: Sequence[int]) -> Any:
        """The tensor, from what `to_matrix` made of it."""
        order = (*self.window, *self.rows, *self.columns)
        return matrix.reshape([shape[axis] for axis in order]).transpose(*np.argsort(order))


class Tensor(NamedTuple):
    """A leaf of the parameters or a part of one: its path with slashes, the names along it, its shape and its role."""

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    role: str

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or a scale, with edges from one node."""
        return self.role in ("bias", "norm")

    @property
    def layout(self) -> Layout:
        """How its axes are read, by its name, rank and role."""
        axes, names = tuple(range(len(self.shape))), self.names
        if self.is_vector or len(axes) < 2:
            return Layout((), (), axes)
        if self.role == "embedding":
            return Layout((), axes[:-1], axes[-1:])
        if names[-1:] == ("weight",):
            return Layout(axes[2:], axes[1:2], axes[:1])
        if self.role == "conv":
            return Layout(axes[:-2], axes[-2:-1], axes[-1:])
        if len(axes) > 2 and names[-2:-1] and names[-2] in OUT:
            return Layout((), axes[:-1], axes[-1:])
        return Layout((), axes[:1], axes[1:])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of a window, rows and columns."""
        return self.layout.sizes(self.shape)


class Ends(NamedTuple):
    """Where the edges of a tensor begin and end: ints, or arrays of them for edges of several tensors.

    Attributes:
      first_row: the node of the first row. Other rows and columns belong to the nodes that follow.
      num_row_nodes: how many nodes the rows belong to. A node has several rows if it is a channel of an image whose
        positions were flattened.
      row_repeats: how many successive rows belong to one node.
      first_column: the node of the first column.
      num_columns: how many columns there are.
      is_diagonal: whether every column has its own row, as in a depthwise convolution.
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
        """The source and the target of edges at places `[n]` in the matrix, row by row. `xp`: NumPy or `jax.numpy`."""
        row, column = position // self.num_columns, position % self.num_columns
        place = xp.where(self.is_diagonal, column, row) // self.row_repeats % self.num_row_nodes
        row, column = self.first_row + place, self.first_column + column
        return xp.where(self.is_reversed, column, row), xp.where(self.is_reversed, row, column)

    @property
    def link(self) -> Link:
        """Which nodes the edges connect."""
        spans = Span(self.first_row, self.num_row_nodes), Span(self.first_column, self.num_columns)
        return Link(*(spans[::-1] if self.is_reversed else spans), is_diagonal=self.is_diagonal)


class Block(NamedTuple):
    """The edges of one tensor: one for every place in its matrix, or one for each cut of the window."""

    kind: int
    layout: Layout
    ends: Ends

    def degrees(self, shape: Sequence[int]) -> tuple[Span, int]:
        """The nodes that the edges lead to, and how many lead to each."""
        _, rows, columns = self.layout.sizes(shape)
        target = self.ends.link.target
        return target, len(self.layout.cuts(shape)) * (rows * columns // max(target.size, 1))


class Piece(NamedTuple):
    """Where a tensor of the graph is: the number of a leaf, and the axis and ends of a slice of it, if it is a part."""

    leaf: int
    axis: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, leaf: Any) -> Any:
        """The tensor, from its leaf, a NumPy or a JAX array."""
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
      links: which nodes are connected, without the loop from each node to itself.
      sources: the sources of edges without a tensor: residual connections, heads, and loops.
      targets: the targets of these edges.
      kinds: the kinds of these edges.
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
