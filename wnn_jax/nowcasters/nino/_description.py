"""Build the neural graph of a model from its description."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wnn_jax._checks import check_int
from wnn_jax.nowcasters.nino._graph import KINDS, NUM_POSITIONS, Block, Ends, Graph, Piece, Tensor
from wnn_jax.nowcasters.nino._laplacian import Link, Span

Description = Mapping[str, Any]

_REMEDY = "Begin with what wnn_jax.nowcasters.neural_graph makes of the parameters."
_KINDS = [kind for kind in KINDS if kind not in ("residual", "head", "self")]


def check_description(description: Any) -> None:
    """Raise a `ValueError` unless a value has the form of a description."""

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{message}. {_REMEDY}")

    known = ("edges", "parts", "residual", "heads", "kinds", "positions")
    has_edges = isinstance(description, Mapping) and isinstance(description.get("edges"), Mapping)
    check(has_edges, f"graph={description!r} must be a mapping with 'edges', from paths of leaves to names of neurons")
    for name in description:
        check(name in known, f"graph has the unknown part {name!r}; it may have {', '.join(known)}")
    for name in ("parts", "heads", "kinds"):
        part = description.get(name, {})
        check(isinstance(part, Mapping), f"graph[{name!r}]={part!r} must be a mapping")
    for path, names in description["edges"].items():
        check(_are_names(names), f"graph['edges'][{path!r}]={names!r} must be a list of names of neurons")
    residual = description.get("residual", ())
    are_pairs = isinstance(residual, Sequence) and all(_are_names(pair) and len(pair) == 2 for pair in residual)
    check(are_pairs, f"graph['residual']={residual!r} must be pairs of names of neurons")
    for name, number in description.get("heads", {}).items():
        check_int(f"graph['heads'][{name!r}]", number, "how many heads there are", minimum=1)
    for path, kind in description.get("kinds", {}).items():
        check(kind in _KINDS, f"graph['kinds'] has the unknown kind {kind!r} for {path!r}; choose from {_KINDS}")
    if "positions" in description:
        try:
            np.asarray(description["positions"], np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"graph['positions'] must be {NUM_POSITIONS} numbers for each node: {error}.") from error


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def build_graph(description: Description, tensors: Sequence[Tensor]) -> Graph:
    """Build a graph from its description, see `neural_graph`, and the leaves of the parameters, in order."""
    check_description(description)
    pieces, tensors = split_tensors(description.get("parts", {}), tensors)
    edges: Mapping[str, Sequence[str]] = description["edges"]
    kinds: Mapping[str, str] = description.get("kinds", {})
    heads: Mapping[str, int] = description.get("heads", {})
    residual: Sequence[Sequence[str]] = description.get("residual", ())
    paths = [tensor.path for tensor in tensors]
    for path in (*paths, *edges):
        if path not in edges:
            raise ValueError(f"graph is of another model: it has no edges for the leaf {path!r} of the parameters.")
        if path not in paths:
            raise ValueError(f"graph is of another model: the parameters have no leaf {path!r}.")
    _check_known("kinds", kinds, edges)
    sizes = _neuron_sizes(edges, {tensor.path: tensor for tensor in tensors}, kinds)
    _check_known("heads", heads, sizes)
    _check_known("residual", [name for pair in residual for name in pair], sizes)
    spans, own, head_spans = _number_nodes(edges, heads, sizes)

    blocks = [
        _block(tensor, edges[tensor.path], KINDS[kinds.get(tensor.path, tensor.role)], spans, own) for tensor in tensors
    ]
    links: list[tuple[Link, int]] = []
    for one, other in residual:
        if sizes[one] != sizes[other]:
            raise ValueError(
                f"graph['residual'] connects {one!r} with {other!r}, but these are {sizes[one]} and {sizes[other]} "
                "neurons."
            )
        links.append((Link(spans[one], spans[other], is_diagonal=True), KINDS["residual"]))
    for name, nodes in head_spans.items():
        width = sizes[name] // nodes.size
        for head in range(nodes.size):
            neurons = Span(spans[name].start + head * width, width)
            links.append((Link(Span(nodes.start + head, 1), neurons, is_diagonal=False), KINDS["head"]))
    num_nodes = sum(span.size for span in (*spans.values(), *head_spans.values())) + len(own)
    everything = Span(0, num_nodes)
    sources, targets, numbers = _expand([*links, (Link(everything, everything, is_diagonal=True), KINDS["self"])])
    degrees = np.bincount(targets, minlength=num_nodes)
    for tensor, block in zip(tensors, blocks, strict=True):
        target, number = block.degrees(tensor.shape)
        degrees[target.start : target.start + target.size] += number
    positions = description.get("positions")
    if positions is not None:
        positions = np.asarray(positions, np.float32)
        if positions.shape != (num_nodes, NUM_POSITIONS):
            raise ValueError(
                f"graph['positions'] has the shape {positions.shape}, but {(num_nodes, NUM_POSITIONS)} is expected: "
                f"{NUM_POSITIONS} numbers for each node."
            )
    all_links = (*(block.ends.link for block in blocks), *(link for link, _ in links))
    return Graph(num_nodes, pieces, tuple(blocks), all_links, sources, targets, numbers, degrees, positions)


def _check_known(part: str, names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            what = "the parameters have no such leaf" if part == "kinds" else "no leaf has neurons of that name"
            raise ValueError(f"graph[{part!r}] names {name!r}, but {what}.")


def split_tensors(
    parts: Mapping[str, Sequence[str]], tensors: Sequence[Tensor]
) -> tuple[tuple[Piece, ...], list[Tensor]]:
    """Split the leaves that are several tensors in one, along the first axis of their outputs.

    Args:
      parts: the names of the tensors in a leaf, by its path.
      tensors: the leaves of the parameters, in order.

    Returns:
      Where each tensor is, and the tensors. A part has the path of its leaf, a colon and its name.
    """
    if unknown := parts.keys() - {tensor.path for tensor in tensors}:
        raise ValueError(f"graph['parts'] names {min(unknown)!r}, but the parameters have no such leaf.")
    pieces: list[Piece] = []
    split: list[Tensor] = []
    for leaf, tensor in enumerate(tensors):
        names = parts.get(tensor.path)
        if names is None:
            pieces.append(Piece(leaf))
            split.append(tensor)
            continue
        axis = tensor.layout.columns[0] if tensor.shape else 0
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


def _neuron_sizes(
    edges: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, int]:
    """How many neurons there are of each name, in the order in which the edges name them."""
    sizes: dict[str, int | None] = {}

    def set_size(name: str, size: int, path: str) -> None:
        if sizes[name] not in (None, size):
            raise ValueError(
                f"graph is of another model: the leaf {path!r} has {size} of the neurons {name!r}, of which there are "
                f"{sizes[name]}."
            )
        sizes[name] = size

    inputs: list[tuple[str, int, str]] = []
    for path, names in edges.items():
        _, rows, columns = tensors[path].sizes
        is_matrix = bool(tensors[path].layout.rows)
        if len(names) != 1 + is_matrix:
            raise ValueError(
                f"graph['edges'][{path!r}]={names!r} must be {'two names' if is_matrix else 'one name'} of neurons, "
                f"because the leaf has the shape {tensors[path].shape}."
            )
        for name in names:
            sizes.setdefault(name, None)
        row_name, column_name = names[::-1] if kinds.get(path) == "key" else (names[0], names[-1])
        set_size(column_name, columns, path)
        if is_matrix:
            inputs.append((row_name, rows, path))
    # Outputs say how many neurons there are. Inputs may be more: the flattened positions of an image.
    for name, rows, path in inputs:
        if sizes[name] is None:
            set_size(name, rows, path)
    return {name: size for name, size in sizes.items() if size is not None}


def _number_nodes(
    edges: Mapping[str, Sequence[str]], heads: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[dict[str, Span], dict[str, int], dict[str, Span]]:
    """Number the nodes of neurons by their names, of vectors by path, and of heads by the names of their neurons."""
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
    return spans, own, head_spans


def _block(tensor: Tensor, names: Sequence[str], kind: int, spans: Mapping[str, Span], own: Mapping[str, int]) -> Block:
    layout, (_, rows, columns) = tensor.layout, tensor.sizes
    # Rows are the inputs; the edges of a key lead back, so its inputs are their target.
    is_reversed = bool(layout.rows) and kind == KINDS["key"]
    source, target = Span(own[tensor.path], 1) if not layout.rows else spans[names[0]], spans[names[-1]]
    row, column = (target, source) if is_reversed else (source, target)
    is_diagonal = bool(layout.rows) and rows == 1 and columns == row.size > 1
    # Only a dense layer can be given several positions of an image.
    if not is_diagonal and (rows != row.size if layout.window else rows % max(row.size, 1)):
        raise ValueError(
            f"graph is of another model: the leaf {tensor.path!r} of shape {tensor.shape} has {rows} inputs, but "
            f"{names[0]!r} are {row.size} neurons."
        )
    # Flattened positions: the channels come last, or first as in Equinox.
    repeats = rows // row.size if layout.is_output_first and not is_diagonal else 1
    return Block(kind, layout, Ends(row.start, row.size, repeats, column.start, columns, is_diagonal, is_reversed))


def _expand(links: Sequence[tuple[Link, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges of links: sources, targets and kinds. One source has edges to all targets of its link."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for link, kind in links:
        targets = np.arange(link.target.start, link.target.start + link.target.size)
        sources = np.broadcast_to(link.source.start + np.arange(link.source.size), targets.shape)
        parts.append((sources, targets, np.full_like(targets, kind)))
    sources, targets, kinds = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    return sources, targets, kinds
