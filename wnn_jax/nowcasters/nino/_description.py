"""Build the neural graph of a model from its description."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wnn_jax._checks import check_int
from wnn_jax.nowcasters.nino._graph import KINDS, NUM_POSITIONS, Block, Ends, Graph, Piece, Tensor
from wnn_jax.nowcasters.nino._laplacian import Link, Span, laplacian_eigenvectors

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
    for name, part in description.items():
        check(name in known, f"graph has the unknown part {name!r}; it may have {', '.join(known)}")
        is_mapping = isinstance(part, Mapping) or name in ("residual", "positions")
        check(is_mapping, f"graph[{name!r}]={part!r} must be a mapping")
    for path, names in description["edges"].items():
        check(_are_names(names), f"graph['edges'][{path!r}]={names!r} must be a list of names of neurons")
    residual = description.get("residual", ())
    are_pairs = isinstance(residual, Sequence) and all(_are_names(pair) and len(pair) == 2 for pair in residual)
    check(are_pairs, f"graph['residual']={residual!r} must be pairs of names of neurons")
    for name, number in description.get("heads", {}).items():
        check_int(f"graph['heads'][{name!r}]", number, "how many heads there are", minimum=1)
    for path, kind in description.get("kinds", {}).items():
        check(kind in _KINDS, f"graph['kinds'] has the unknown kind {kind!r} for {path!r}; choose from {_KINDS}")
    try:
        np.asarray(description.get("positions", 0), np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"graph['positions'] must be {NUM_POSITIONS} numbers for each node: {error}.") from error


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def build_graph(description: Description, tensors: Sequence[Tensor]) -> Graph:
    """Build a graph from its description, see `neural_graph`, and the leaves of the parameters, in order."""
    check_description(description)
    pieces = split_tensors(description.get("parts", {}), tensors)
    edges: Mapping[str, Sequence[str]] = description["edges"]
    kinds, heads, residual = (description.get(part, {}) for part in ("kinds", "heads", "residual"))
    by_path = {piece.tensor.path: piece.tensor for piece in pieces}
    for path in (*by_path, *edges):
        if path not in edges:
            raise ValueError(f"graph is of another model: it has no edges for the leaf {path!r} of the parameters.")
        if path not in by_path:
            raise ValueError(f"graph is of another model: the parameters have no leaf {path!r}.")
    _check_known("kinds", kinds, edges)
    sizes = _neuron_sizes(edges, by_path, kinds)
    _check_known("heads", heads, sizes)
    _check_known("residual", [name for pair in residual for name in pair], sizes)
    spans, own, head_spans = _number_nodes(edges, heads, sizes)

    blocks = tuple(
        _block(piece, edges[path], kinds.get(path, tensor.role), spans, own.get(path))
        for piece, (path, tensor) in zip(pieces, by_path.items(), strict=True)
    )
    links: list[tuple[Link, str]] = []
    for one, other in residual:
        if sizes[one] != sizes[other]:
            raise ValueError(
                f"graph['residual'] connects {one!r} with {other!r}, but these are {sizes[one]} and {sizes[other]} "
                "neurons."
            )
        links.append((Link(spans[one], spans[other], is_diagonal=True), "residual"))
    for name, number in heads.items():
        width = sizes[name] // number
        for head in range(number):
            neurons = Span(spans[name].start + head * width, width)
            links.append((Link(Span(head_spans[name].start + head, 1), neurons, is_diagonal=False), "head"))
    everything = Span(0, sum(span.size for span in (*spans.values(), *head_spans.values())) + len(own))
    loops = Link(everything, everything, is_diagonal=True), "self"
    sources, targets, numbers = np.concatenate([_expand(*link) for link in (*links, loops)], axis=1).astype(np.int32)
    degrees = np.bincount(targets, minlength=everything.size)
    for block in blocks:
        target, (_, rows, columns) = block.ends.link.target, block.piece.tensor.sizes
        number = len(block.piece.tensor.cuts) * (rows * columns // max(target.size, 1))
        degrees[target.start : target.start + target.size] += number
    positions, expected = description.get("positions"), (everything.size, NUM_POSITIONS)
    if positions is None:
        connections = [*(block.ends.link for block in blocks), *(link for link, _ in links)]
        positions = laplacian_eigenvectors(connections, *expected)
    elif np.shape(positions) != expected:
        raise ValueError(
            f"graph['positions'] has the shape {np.shape(positions)}, but {expected} is expected: {NUM_POSITIONS} "
            "numbers for each node."
        )
    return Graph(blocks, sources, targets, numbers, degrees, np.asarray(positions, np.float32))


def _check_known(part: str, names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            what = "the parameters have no such leaf" if part == "kinds" else "no leaf has neurons of that name"
            raise ValueError(f"graph[{part!r}] names {name!r}, but {what}.")


def split_tensors(parts: Mapping[str, Sequence[str]], tensors: Sequence[Tensor]) -> list[Piece]:
    """Split the leaves that are several tensors in one, along the first axis of their outputs.

    A part has the path of its leaf, a colon and its name. `parts` maps the paths of leaves to the names of their parts.
    """
    if unknown := parts.keys() - {tensor.path for tensor in tensors}:
        raise ValueError(f"graph['parts'] names {min(unknown)!r}, but the parameters have no such leaf.")
    pieces: list[Piece] = []
    for leaf, tensor in enumerate(tensors):
        names = parts.get(tensor.path)
        if names is None:
            pieces.append(Piece(leaf, tensor))
            continue
        axis = tensor.axes[2][0] if tensor.shape else 0
        outputs = tensor.shape[axis] if tensor.shape else 0
        if isinstance(names, str) or not names or len(set(names)) < len(names) or outputs % len(names):
            raise ValueError(
                f"graph['parts'][{tensor.path!r}]={names!r} must be different names that divide the {outputs} outputs "
                f"of the leaf, of the shape {tensor.shape}, into equal parts."
            )
        size = outputs // len(names)
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
        for number, name in enumerate(names):
            part = tensor._replace(path=f"{tensor.path}:{name}", shape=shape)
            pieces.append(Piece(leaf, part, axis, number * size))
    return pieces


def _neuron_sizes(
    edges: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, int]:
    """Return how many neurons there are of each name, in the order in which the edges name them."""
    uses: dict[str, tuple[list[tuple[int, str]], list[tuple[int, str]]]] = {}
    for path, names in edges.items():
        _, rows, columns = tensors[path].sizes
        is_matrix = bool(tensors[path].axes[1])
        if len(names) != 1 + is_matrix:
            raise ValueError(
                f"graph['edges'][{path!r}]={names!r} must be {'two names' if is_matrix else 'one name'} of neurons, "
                f"because the leaf has the shape {tensors[path].shape}."
            )
        ends = [(True, rows), (False, columns)] if is_matrix else [(False, columns)]
        for name, (is_input, size) in zip(names, ends[::-1] if kinds.get(path) == "key" else ends, strict=True):
            uses.setdefault(name, ([], []))[is_input].append((size, path))
    sizes: dict[str, int] = {}
    for name, (outputs, inputs) in uses.items():
        # Outputs say how many neurons there are. Inputs may be more: the flattened positions of an image.
        for size, path in outputs or inputs[:1]:
            if sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"graph is of another model: the leaf {path!r} has {size} of the neurons {name!r}, but there are "
                    f"{sizes[name]}."
                )
    return sizes


def _number_nodes(
    edges: Mapping[str, Sequence[str]], heads: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[dict[str, Span], dict[str, Span], dict[str, Span]]:
    """Number the nodes of neurons by their names, of vectors by path, and of heads by the names of their neurons."""
    spans: dict[str, Span] = {}
    own: dict[str, Span] = {}
    head_spans: dict[str, Span] = {}
    next_node = 0
    for name, size in sizes.items():
        if size % heads.get(name, 1):
            raise ValueError(f"graph['heads'] has {heads[name]} heads for the {size} neurons {name!r}.")
        vectors = [(own, path, 1) for path, names in edges.items() if list(names) == [name]]
        for group, key, number in (*vectors, (head_spans, name, heads.get(name, 0)), (spans, name, size)):
            group[key] = Span(next_node, number)
            next_node += number
    return spans, own, head_spans


def _block(piece: Piece, names: Sequence[str], kind: str, spans: Mapping[str, Span], own: Span | None) -> Block:
    """Connect the neurons of these names, or a vector's own node and its neurons, by the edges of a tensor."""
    tensor = piece.tensor
    (window, inputs, outputs), (_, rows, columns) = tensor.axes, tensor.sizes
    # Rows are the inputs. The edges of a key lead back, so its inputs are their target.
    is_reversed = bool(inputs) and kind == "key"
    source, target = own or spans[names[0]], spans[names[-1]]
    row, column = (target, source) if is_reversed else (source, target)
    is_diagonal = bool(inputs) and rows == 1 and columns == row.size > 1
    # Only a dense layer can be given several positions of an image.
    if not is_diagonal and (rows != row.size if window else rows % max(row.size, 1)):
        raise ValueError(
            f"graph is of another model: the leaf {tensor.path!r} of shape {tensor.shape} has {rows} inputs, but "
            f"{names[0]!r} are {row.size} neurons."
        )
    # The channels of flattened positions come last, or first as in Equinox.
    repeats = rows // row.size if outputs < inputs and not is_diagonal else 1
    ends = Ends(row.start, row.size, repeats, column.start, columns, is_diagonal, is_reversed)
    return Block(piece, KINDS[kind], ends)


def _expand(link: Link, kind: str) -> np.ndarray:
    """Return the sources, targets and kinds of the edges of a link. A single source has edges to all targets."""
    targets = link.target.start + np.arange(link.target.size)
    sources = np.broadcast_to(link.source.start + np.arange(link.source.size), targets.shape)
    return np.stack([sources, targets, np.full_like(targets, KINDS[kind])])
