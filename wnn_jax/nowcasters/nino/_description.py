"""Building the neural graph of a model from its description."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wnn_jax._checks import check_int
from wnn_jax.nowcasters.nino._graph import (
    KINDS,
    NUM_POSITIONS,
    Block,
    Ends,
    Graph,
    Layout,
    Piece,
    Tensor,
    layout_of,
)
from wnn_jax.nowcasters.nino._laplacian import Link, Span

Description = Mapping[str, Any]


def build_graph(description: Description, tensors: Sequence[Tensor]) -> Graph:
    """Builds a graph from its description.

    Args:
      description: see `neural_graph`.
      tensors: the leaves of the parameters, in order.

    Raises:
      ValueError: if the description is of other parameters, naming the first leaf that differs.
    """
    check_description(description)
    pieces, tensors = split_tensors(description.get("parts", {}), tensors)
    edges: Mapping[str, Sequence[str]] = description["edges"]
    _check_same_leaves(edges, tensors)
    kinds: Mapping[str, str] = description.get("kinds", {})
    if unknown := [path for path in kinds if path not in edges]:
        raise ValueError(f"graph['kinds'] names {unknown[0]!r}, but the parameters have no such leaf.")
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
    return Graph(num_nodes, pieces, tuple(blocks), tuple(links), sources, targets, numbers, degrees, positions)


def split_tensors(
    parts: Mapping[str, Sequence[str]], tensors: Sequence[Tensor]
) -> tuple[tuple[Piece, ...], list[Tensor]]:
    """Splits the leaves that are several tensors in one, along the first axis of their outputs.

    Args:
      parts: the names of the tensors in a leaf, by its path.
      tensors: the leaves of the parameters, in order.

    Returns:
      Where each tensor is, and the tensors; one that is a part has the path of its leaf with its own name behind it.

    Raises:
      ValueError: if there is no such leaf, or it cannot be split into as many.
    """
    if unknown := [path for path in parts if path not in {tensor.path for tensor in tensors}]:
        raise ValueError(f"graph['parts'] names {unknown[0]!r}, but the parameters have no such leaf.")
    pieces: list[Piece] = []
    split: list[Tensor] = []
    for leaf, tensor in enumerate(tensors):
        names = parts.get(tensor.path)
        if names is None:
            pieces.append(Piece(leaf))
            split.append(tensor)
            continue
        axis = layout_of(tensor.names, tensor.shape, tensor.role).columns[0] if tensor.shape else 0
        outputs = tensor.shape[axis] if tensor.shape else 0
        if isinstance(names, str) or not names or len(set(names)) < len(names) or outputs % len(names):
            raise ValueError(
                f"graph['parts'][{tensor.path!r}]={names!r} must be different names, in equal parts of which the "
                f"{outputs} outputs of the leaf, of the shape {tensor.shape}, are divided."
            )
        size = outputs // len(names)
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
        for number, name in enumerate(names):
            pieces.append(Piece(leaf, axis, number * size, (number + 1) * size))
            split.append(tensor._replace(path=f"{tensor.path}:{name}", shape=shape))
    return tuple(pieces), split


def check_description(description: Any) -> None:
    """Raises a `ValueError` unless it has the form of a description."""
    parts = ("edges", "parts", "residual", "heads", "kinds", "positions")
    remedy = "Begin with what wnn_jax.nowcasters.neural_graph makes of the parameters."
    if not isinstance(description, Mapping) or not isinstance(description.get("edges"), Mapping):
        raise ValueError(
            f"graph={description!r} must be a mapping with 'edges', from the path of each leaf to the names of the "
            f"neurons that it connects. {remedy}"
        )
    if unknown := [name for name in description if name not in parts]:
        raise ValueError(f"graph has the unknown part {unknown[0]!r}; it may have {', '.join(parts)}. {remedy}")
    for name in ("parts", "heads", "kinds"):
        if not isinstance(part := description.get(name, {}), Mapping):
            raise ValueError(f"graph[{name!r}]={part!r} must be a mapping. {remedy}")
    for path, names in description["edges"].items():
        if not _is_of_names(names):
            raise ValueError(f"graph['edges'][{path!r}]={names!r} must be a list of names of neurons. {remedy}")
    residual = description.get("residual", ())
    if not isinstance(residual, Sequence) or not all(_is_of_names(pair) and len(pair) == 2 for pair in residual):
        raise ValueError(f"graph['residual']={residual!r} must be pairs of names of neurons. {remedy}")
    for name, number in description.get("heads", {}).items():
        check_int(f"graph['heads'][{name!r}]", number, "how many heads there are", minimum=1)
    if "positions" in description:
        try:
            np.asarray(description["positions"], np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"graph['positions'] must be {NUM_POSITIONS} numbers for each node: {error}.") from error
    kinds = [kind for kind in KINDS if kind not in ("residual", "head", "self")]
    for path, kind in description.get("kinds", {}).items():
        if kind not in kinds:
            raise ValueError(f"graph['kinds'] has the unknown kind {kind!r} for {path!r}; choose from {kinds}.")


def _is_of_names(value: Any) -> bool:
    """Whether it is a list or a tuple of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


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
        if len(names) != 1 + is_matrix:
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
            if size % heads[name]:
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
    _, rows, columns = layout.sizes(tensor.shape)
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
    # Of the positions of an image, dense layers alone are given more than one.
    if not is_diagonal and (rows != row.size if layout.window else rows % max(row.size, 1)):
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
    ends, num_cuts = block.ends, len(block.layout.cuts(shape))
    if ends.is_reversed:
        degrees[ends.first_row : ends.first_row + ends.num_row_nodes] += num_cuts * rows * columns // ends.num_row_nodes
    else:
        degrees[ends.first_column : ends.first_column + columns] += num_cuts * rows


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
