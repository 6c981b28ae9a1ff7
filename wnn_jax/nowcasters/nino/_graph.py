"""The neural graph of a model: its neurons as nodes, and an edge for every weight between two of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.nowcasters.nino._laplacian import Link, Span

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


class Tensor(NamedTuple):
    """A leaf of the parameters or a part of one: its path with slashes, the names along it, its shape and its role.

    It is a matrix of windows. A vector is a single row.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    role: str

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias or a scale, with edges from one node."""
        return self.role in ("bias", "norm")

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes of the window, of the inputs (none for vectors) and of the outputs, by name, rank and role."""
        axes, names = tuple(range(len(self.shape))), self.names
        if self.is_vector or len(axes) < 2:
            return (), (), axes
        if self.role == "embedding":
            return (), axes[:-1], axes[-1:]
        if names[-1:] == ("weight",):
            return axes[2:], axes[1:2], axes[:1]
        if self.role == "conv":
            return axes[:-2], axes[-2:-1], axes[-1:]
        if len(axes) > 2 and names[-2:-1] and names[-2] in OUT:
            return (), axes[:-1], axes[-1:]
        return (), axes[:1], axes[1:]

    @property
    def sizes(self) -> list[int]:
        """Elements of a window, rows and columns."""
        return [math.prod(self.shape[axis] for axis in axes) for axes in self.axes]

    @property
    def cuts(self) -> list[slice]:
        """The elements of the window that each of the edges between two neurons holds."""
        window = self.sizes[0]
        return [slice(start, min(start + MAX_WINDOW, window)) for start in range(0, window, MAX_WINDOW)]

    def to_matrix(self, array: Any) -> Any:
        """Return `[window, rows * columns]`, from a NumPy or a JAX array."""
        return array.transpose(*sum(self.axes, ())).reshape(self.sizes[0], -1)

    def from_matrix(self, matrix: Any) -> Any:
        """Undo `to_matrix`."""
        order = sum(self.axes, ())
        return matrix.reshape([self.shape[axis] for axis in order]).transpose(*np.argsort(order))


class Ends(NamedTuple):
    """Where the edges of a tensor begin and end: ints, or arrays of them for edges of several tensors.

    Rows and columns belong to nodes that follow one another. A node has several rows if it is a channel of an image
    whose positions were flattened.
    """

    first_row: Any
    num_row_nodes: Any
    row_repeats: Any
    """How many successive rows belong to one node."""
    first_column: Any
    num_columns: Any
    is_diagonal: Any
    """Whether every column has its own row, as in a depthwise convolution."""
    is_reversed: Any
    """Whether the edges lead from columns to rows."""

    def at(self, position: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Return the sources and the targets of edges at places `[n]` in the matrix, row by row."""
        row, column = position // self.num_columns, position % self.num_columns
        place = xp.where(self.is_diagonal, column, row) // self.row_repeats % self.num_row_nodes
        row, column = self.first_row + place, self.first_column + column
        return xp.where(self.is_reversed, column, row), xp.where(self.is_reversed, row, column)

    @property
    def link(self) -> Link:
        """Which nodes the edges connect."""
        spans = Span(self.first_row, self.num_row_nodes), Span(self.first_column, self.num_columns)
        return Link(*(spans[::-1] if self.is_reversed else spans), is_diagonal=self.is_diagonal)


class Piece(NamedTuple):
    """The number of the leaf that a tensor is in. If it is a part: the axis and the start of its slice of the leaf."""

    leaf: int
    tensor: Tensor
    axis: int | None = None
    start: int = 0

    def of(self, leaf: Any) -> Any:
        """Return the tensor, from its leaf, a NumPy or a JAX array."""
        if self.axis is None:
            return leaf
        return leaf[(slice(None),) * self.axis + (slice(self.start, self.start + self.tensor.shape[self.axis]),)]

    def put(self, leaf: jax.Array, tensor: jax.Array) -> jax.Array:
        """Return the leaf with another tensor in its place."""
        if self.axis is None:
            return tensor
        return jax.lax.dynamic_update_slice_in_dim(leaf, tensor, self.start, axis=self.axis)


class Block(NamedTuple):
    """The edges of one tensor: one for every place in its matrix, or one for each cut of the window."""

    piece: Piece
    kind: int
    ends: Ends


class Graph(NamedTuple):
    """A neural graph: the edges of tensors in the order of leaves, and residual connections, heads and loops."""

    blocks: tuple[Block, ...]
    sources: np.ndarray
    targets: np.ndarray
    kinds: np.ndarray
    degrees: np.ndarray
    """`[nodes]`, how many edges lead to each node."""
    positions: np.ndarray
    """`[nodes, 8]`, the place of each node: as given, or eigenvectors of the Laplacian."""
