"""The neural graph of a model: its neurons as nodes, and an edge for every weight between two of them."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wnn_jax.nowcasters._neural_graph.laplacian import Link, Span, laplacian_eigenvectors

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
# The largest window of a convolution, in elements.
MAX_WINDOW = 9

# The names of the parts of an attention module, as linen, nnx and Equinox have them, and of its projection back.
QUERY, KEY, VALUE = ("query", "query_proj"), ("key", "key_proj"), ("value", "value_proj")
OUT = ("out", "output_proj")

Description = Mapping[str, Any]


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
    if names[-1] == "weight":
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
    """The edges of one tensor, an edge for every place in its matrix.

    Attributes:
      kind: what its edges are.
      layout: how the tensor is read as a matrix.
      ends: where they begin and end.
    """

    kind: int
    layout: Layout
    ends: Ends


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A neural graph.

    Attributes:
      num_nodes: how many nodes there are.
      blocks: the edges of each tensor, in the order of the leaves.
      links: what is connected, by tensors or otherwise, without the loops from each node to itself.
      sources: of the edges that no tensor has: residual connections, heads, and loops.
      targets: of the same.
      kinds: of the same.
      degrees: `[num_nodes]`, how many edges lead to each node.
      given_positions: `[num_nodes, 8]`, the place of each node, or `None`.
    """

    num_nodes: int
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
    """What a graph is built from: one leaf of the parameters.

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


def build_graph(description: Description, tensors: Sequence[Tensor]) -> Graph:
    """Builds a graph from its description.

    Args:
      description: see `neural_graph`.
      tensors: the leaves of the parameters, in order.

    Raises:
      ValueError: if the description is of other parameters, naming the first leaf that differs.
    """
    check_description(description)
    edges: Mapping[str, Sequence[str]] = description["edges"]
    _check_same_leaves(edges, tensors)
    kinds: Mapping[str, str] = description.get("kinds", {})
    heads: Mapping[str, int] = description.get("heads", {})
    layouts = {tensor.path: layout_of(tensor.names, tensor.shape, tensor.role) for tensor in tensors}
    sizes = _neuron_sizes(edges, {tensor.path: tensor.shape for tensor in tensors}, layouts, kinds)
    spans, own, head_spans = _number_nodes(edges, heads, sizes)

    blocks: list[Block] = []
    links: list[Link] = []
    for tensor in tensors:
        kind = kinds.get(tensor.path, tensor.role)
        block, link = _block(tensor, edges[tensor.path], KINDS[kind], layouts[tensor.path], spans, own)
        blocks.append(block)
        links.append(link)
    auxiliary: list[tuple[Link, int]] = []
    for one, other in description.get("residual", ()):
        for name in (one, other):
            if name not in spans:
                raise ValueError(f"graph['residual'] names {name!r}, but no leaf has neurons of that name.")
        if spans[one].size != spans[other].size:
            raise ValueError(
                f"graph['residual'] connects {one!r} with {other!r}, but these are {spans[one].size} and "
                f"{spans[other].size} neurons."
            )
        auxiliary.append((Link(spans[one], spans[other], is_diagonal=True), KINDS["residual"]))
    for name, nodes in head_spans.items():
        width = spans[name].size // nodes.size
        auxiliary += [
            (
                Link(Span(nodes.start + head, 1), Span(spans[name].start + head * width, width), is_diagonal=False),
                KINDS["head"],
            )
            for head in range(nodes.size)
        ]
    num_nodes = sum(span.size for span in (*spans.values(), *head_spans.values())) + len(own)
    everything = Span(0, num_nodes)
    sources, targets, numbers = _expand([*auxiliary, (Link(everything, everything, is_diagonal=True), KINDS["self"])])
    degrees = np.bincount(targets, minlength=num_nodes)
    for tensor, block in zip(tensors, blocks, strict=True):
        _add_degrees(degrees, block, tensor.shape)
    links += [link for link, _ in auxiliary]
    positions = description.get("positions")
    if positions is not None:
        positions = np.asarray(positions, np.float32)
        if positions.shape != (num_nodes, NUM_POSITIONS):
            raise ValueError(
                f"graph['positions'] has the shape {positions.shape}, but {(num_nodes, NUM_POSITIONS)} is expected: "
                f"{NUM_POSITIONS} numbers for each node."
            )
    return Graph(num_nodes, tuple(blocks), tuple(links), sources, targets, numbers, degrees, positions)


def check_description(description: Any) -> None:
    """Raises a `ValueError` unless it has the form of a description."""
    parts = ("edges", "residual", "heads", "kinds", "positions")
    remedy = "Begin with what wnn_jax.nowcasters.neural_graph makes of the parameters."
    if not isinstance(description, Mapping) or not isinstance(description.get("edges"), Mapping):
        raise ValueError(
            f"graph={description!r} must be a mapping with 'edges', from the path of each leaf to the names of the "
            f"neurons that it connects. {remedy}"
        )
    if unknown := [name for name in description if name not in parts]:
        raise ValueError(f"graph has the unknown part {unknown[0]!r}; it may have {', '.join(parts)}. {remedy}")
    for path, kind in description.get("kinds", {}).items():
        if kind not in KINDS:
            raise ValueError(f"graph['kinds'] has the unknown kind {kind!r} for {path!r}; choose from {[*KINDS]}.")


def _check_same_leaves(edges: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    paths = [tensor.path for tensor in tensors]
    for path in paths:
        if path not in edges:
            raise ValueError(f"graph is of another model: it has no edges for the leaf {path!r} of the parameters.")
    for path in edges:
        if path not in paths:
            raise ValueError(f"graph is of another model: the parameters have no leaf {path!r}.")


def _neuron_sizes(
    edges: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    kinds: Mapping[str, str],
) -> dict[str, int]:
    """How many neurons there are of each name, in the order in which the edges name them."""
    sizes: dict[str, int | None] = {}
    inputs: list[tuple[str, str, int]] = []
    for path, names in edges.items():
        _, rows, columns = layouts[path].sizes(shapes[path])
        is_matrix = bool(layouts[path].rows)
        if isinstance(names, str) or len(names) != 1 + is_matrix:
            raise ValueError(
                f"graph['edges'][{path!r}]={names!r} must be {'two names' if is_matrix else 'one name'} of neurons, "
                f"for the leaf has the shape {shapes[path]}."
            )
        for name in names:
            sizes.setdefault(name, None)
        row_name, column_name = names[0], names[-1]
        if kinds.get(path) == "key":
            row_name, column_name = column_name, row_name
        _set_size(sizes, column_name, columns, path)
        if is_matrix:
            inputs.append((path, row_name, rows))
    # What neurons give out says how many there are. What comes in may be more, where positions were flattened.
    for path, name, rows in inputs:
        if sizes[name] is None:
            _set_size(sizes, name, rows, path)
    return {name: size for name, size in sizes.items() if size is not None}


def _set_size(sizes: dict[str, int | None], name: str, size: int, path: str) -> None:
    if sizes[name] not in (None, size):
        raise ValueError(
            f"graph is of another model: the leaf {path!r} has {size} of the neurons {name!r}, of which there are "
            f"{sizes[name]}."
        )
    sizes[name] = size


def _number_nodes(
    edges: Mapping[str, Sequence[str]], heads: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[dict[str, Span], dict[str, int], dict[str, Span]]:
    """Numbers the nodes: neurons in their order, before each the nodes of its vectors and of its heads.

    Returns:
      The nodes of all neurons by name, those of vectors by path, and those of heads by the name of their neurons.
    """
    spans: dict[str, Span] = {}
    own: dict[str, int] = {}
    head_spans: dict[str, Span] = {}
    next_node = 0
    for name, size in sizes.items():
        for path, names in edges.items():
            if list(names) == [name]:
                own[path] = next_node
                next_node += 1
        if name in heads:
            if heads[name] < 1 or size % heads[name]:
                raise ValueError(f"graph['heads'] has {heads[name]} heads for the {size} neurons {name!r}.")
            head_spans[name] = Span(next_node, heads[name])
            next_node += heads[name]
        spans[name] = Span(next_node, size)
        next_node += size
    if unknown := [name for name in heads if name not in spans]:
        raise ValueError(f"graph['heads'] names {unknown[0]!r}, but no leaf has neurons of that name.")
    return spans, own, head_spans


def _block(
    tensor: Tensor,
    names: Sequence[str],
    kind: int,
    layout: Layout,
    spans: Mapping[str, Span],
    own: Mapping[str, int],
) -> tuple[Block, Link]:
    window, rows, columns = layout.sizes(tensor.shape)
    if window > MAX_WINDOW:
        raise ValueError(
            f"the leaf {tensor.path!r} of shape {tensor.shape} has windows of {window} elements, but NiNo has edges "
            f"for {MAX_WINDOW} at most, 3 x 3. Leave it out with optax.masked, or choose another nowcaster."
        )
    if not layout.rows:
        row, column = Span(own[tensor.path], 1), spans[names[-1]]
        return (
            Block(kind, layout, Ends(row.start, 1, 1, column.start, columns)),
            Link(row, column, is_diagonal=False),
        )
    source, target = spans[names[0]], spans[names[1]]
    # Rows are what comes in; of a key, whose edges lead back, that is their target.
    is_reversed = kind == KINDS["key"]
    row, column = (target, source) if is_reversed else (source, target)
    is_diagonal = rows == 1 and columns == row.size > 1
    if not is_diagonal and rows % row.size:
        raise ValueError(
            f"graph is of another model: the leaf {tensor.path!r} of shape {tensor.shape} has {rows} inputs, but "
            f"{names[0]!r} are {row.size} neurons."
        )
    # Flattened positions: the channels come last, or first as in Equinox.
    repeats = rows // row.size if layout.is_output_first and not is_diagonal else 1
    ends = Ends(row.start, row.size, repeats, column.start, columns, is_diagonal, is_reversed)
    linked = (column, row) if is_reversed else (row, column)
    return Block(kind, layout, ends), Link(*linked, is_diagonal=is_diagonal)


def _add_degrees(degrees: np.ndarray, block: Block, shape: Sequence[int]) -> None:
    _, rows, columns = block.layout.sizes(shape)
    ends = block.ends
    if ends.is_reversed:
        degrees[ends.first_row : ends.first_row + ends.num_row_nodes] += rows * columns // ends.num_row_nodes
    else:
        degrees[ends.first_column : ends.first_column + columns] += rows


def _expand(links: Sequence[tuple[Link, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges of links: sources, targets and kinds. All of one span are connected with all of the other by heads."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for link, kind in links:
        targets = np.arange(link.target.start, link.target.start + link.target.size)
        sources = np.arange(link.source.start, link.source.start + link.source.size)
        sources = np.broadcast_to(sources, targets.shape)
        parts.append((sources, targets, np.full_like(targets, kind)))
    sources, targets, kinds = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    return sources, targets, kinds
