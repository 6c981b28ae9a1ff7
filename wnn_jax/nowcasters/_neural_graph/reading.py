"""Reading the neural graph of a model from the names and the shapes of its parameters."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from wnn_jax.nowcasters._neural_graph.graph import KEY, OUT, QUERY, VALUE, Tensor, layout_of

# A module's name and the number that tells it from others of its kind.
_NUMBERED = re.compile(r"(.*?)_?(\d*)")
_RESIDUAL_BLOCK = re.compile(r".*(res(net|idual)?|basic|bottleneck).*block.*")
_SHORTCUT = re.compile(r".*(proj|shortcut|downsample|skip).*")
_POSITION = re.compile(r"wpe|.*pos.*emb.*")
_INPUT = "input"

_REMEDY = (
    "Say how the model is connected, with NiNo(graph=...): begin with the description of a model that can be read, see "
    "wnn_jax.nowcasters.neural_graph."
)


@dataclasses.dataclass
class _Module:
    """A module: its own tensors, and the modules within.

    Attributes:
      path: the names that lead to it.
      tensors: its own.
      children: the modules within, by name.
    """

    path: tuple[str, ...] = ()
    tensors: list[Tensor] = dataclasses.field(default_factory=list[Tensor])
    children: dict[str, "_Module"] = dataclasses.field(default_factory=dict[str, "_Module"])

    @property
    def label(self) -> str:
        """Names its neurons."""
        return "/".join(self.path) or "model"

    @property
    def stem(self) -> tuple[str, int]:
        """Its name without its number, and the number."""
        match = _NUMBERED.fullmatch(self.path[-1])
        assert match is not None
        return match[1], int(match[2] or 0)

    @property
    def matrix(self) -> Tensor | None:
        """The kernel or the table that it has."""
        return next((tensor for tensor in self.tensors if tensor.role in ("conv", "dense", "embedding")), None)

    @property
    def vectors(self) -> list[Tensor]:
        """Its biases and scales."""
        return [tensor for tensor in self.tensors if tensor.role in ("bias", "norm")]

    @property
    def is_norm(self) -> bool:
        """Whether it has vectors and nothing else."""
        return bool(self.tensors) and not self.children and self.matrix is None

    @property
    def is_attention(self) -> bool:
        """Whether it has queries, keys and values."""
        return all(self.part(names) is not None for names in (QUERY, KEY, VALUE))

    @property
    def has_attention(self) -> bool:
        """Whether attention is in it, at whatever depth."""
        return any(module.is_attention for module in self.walk())

    @property
    def rank(self) -> int:
        """Modules of a lower rank come first in a model: embeddings, convolutions and blocks, dense layers."""
        matrices = [module.matrix for module in self.walk() if module.matrix is not None]
        if self.matrix is not None and self.matrix.role == "embedding":
            return 0
        return 1 if self.has_attention or any(matrix.role == "conv" for matrix in matrices) else 2

    def part(self, names: Sequence[str]) -> "_Module | None":
        """The child of one of these names."""
        return next((self.children[name] for name in names if name in self.children), None)

    @property
    def first(self) -> Tensor:
        """A tensor to name it by: a matrix, if there is one."""
        tensors = [
            tensor for module in self.walk() for tensor in (module.matrix, *module.tensors) if tensor is not None
        ]
        return next((tensor for tensor in tensors if len(tensor.shape) > 1), tensors[0])

    def walk(self) -> Iterator["_Module"]:
        """Itself and all modules within."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def read_graph(tensors: Sequence[Tensor], paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Reads how a model is connected: see `wnn_jax.nowcasters.neural_graph`.

    Args:
      tensors: the leaves of the parameters.
      paths: the names along the path of each, in lower case, without the classes of modules.

    Raises:
      ValueError: if it cannot be read, naming a leaf.
    """
    root = _Module()
    for tensor, path in zip(tensors, paths, strict=True):
        module, names = root, _without_lists(path)
        for depth, name in enumerate(names[:-1]):
            module = module.children.setdefault(name, _Module(names[: depth + 1]))
        module.tensors.append(tensor)
    reader = _Reader()
    reader.read(root, None)
    unread = [tensor for tensor in tensors if tensor.path not in reader.edges]
    if unread:
        _refuse(unread[0], "it belongs to nothing that is known")
    description: dict[str, Any] = {"edges": reader.edges}
    for name in ("residual", "heads", "kinds"):
        if part := getattr(reader, name):
            description[name] = part
    return description


def _without_lists(names: Sequence[str]) -> tuple[str, ...]:
    """Names in which the modules of a list are numbered like those of Flax, and lie where the list does."""
    flat: list[str] = []
    for name in names:
        if name.isdigit() and flat:
            flat[-1] += f"_{name}"
        else:
            flat.append(name)
    return tuple(flat)


@dataclasses.dataclass(frozen=True)
class _Neurons:
    """The output of what was read so far.

    Attributes:
      name: of the neurons.
      size: how many there are.
      is_image: whether there may be a neuron at each of several positions, which a dense layer can be given flattened.
    """

    name: str
    size: int
    is_image: bool


@dataclasses.dataclass
class _Reader:
    """What was read: the parts of a description."""

    edges: dict[str, list[str]] = dataclasses.field(default_factory=dict[str, list[str]])
    residual: list[list[str]] = dataclasses.field(default_factory=list[list[str]])
    heads: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    kinds: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def read(self, module: _Module, before: _Neurons | None) -> _Neurons | None:
        """Reads a module that is given some neurons, or is the first, and returns what it gives out."""
        if module.tensors and not module.children and module.matrix is not None:
            return self._read_matrix(module, before)
        if module.is_attention:
            return self._read_attention(module, before)
        return self._read_container(module, before)

    def _read_matrix(self, module: _Module, before: _Neurons | None) -> _Neurons:
        matrix = module.matrix
        assert matrix is not None
        _, rows, columns = _sizes(matrix)
        if before is None:
            name = f"{module.label} inputs" if matrix.role == "embedding" else _INPUT
            before = _Neurons(name, rows, is_image=False)
        self.edges[matrix.path] = [before.name, module.label]
        for vector in module.vectors:
            self.edges[vector.path] = [module.label]
        return _Neurons(module.label, columns, is_image=matrix.role == "conv")

    def _read_attention(self, module: _Module, before: _Neurons | None) -> _Neurons:
        parts = {name: module.part(names) for name, names in _PARTS.items()}
        if before is None or parts["out"] is None:
            _refuse(module.first, f"its attention has no {'input' if before is None else 'projection back'}")
        query, value = f"{module.label} queries", f"{module.label} values"
        ends = {
            "query": [before.name, query],
            # Queries and keys are multiplied: the same neurons, through which the edges of keys lead back.
            "key": [query, before.name],
            "value": [before.name, value],
            "out": [value, module.label],
        }
        sizes: dict[str, int] = {}
        for name, part in parts.items():
            assert part is not None
            matrix = part.matrix
            if matrix is None or part.children:
                _refuse(part.first, "it is no matrix of attention")
            _, rows, sizes[name] = _sizes(matrix)
            expected = before.size if name != "out" else sizes["value"]
            if rows != expected:
                _refuse(matrix, f"it has {rows} inputs where there are {expected} neurons")
            self.edges[matrix.path] = ends[name]
            if name != "out":
                self.kinds[matrix.path] = name
            for vector in part.vectors:
                self.edges[vector.path] = [ends[name][1 if name != "key" or sizes[name] == before.size else 0]]
            if name in ("query", "value"):
                self.heads[ends[name][1]] = matrix.shape[1] if len(matrix.shape) == 3 else 1
        if sizes["key"] != sizes["query"]:
            key = parts["key"]
            assert key is not None
            _refuse(key.first, f"it has {sizes['key']} outputs where there are {sizes['query']} queries")
        if sizes["out"] == before.size:
            self.residual.append([before.name, module.label])
        return _Neurons(module.label, sizes["out"], is_image=False)

    def _read_container(self, module: _Module, before: _Neurons | None) -> _Neurons | None:
        if module.tensors:
            _refuse(module.tensors[0], "it lies beside other modules")
        norms = sorted((child for child in module.children.values() if child.is_norm), key=lambda child: child.stem)
        items = [child for child in module.children.values() if not child.is_norm]
        given, outputs = before, list[_Neurons]()
        embeddings = [item for item in items if item.rank == 0]
        if embeddings:
            before = self._read_embeddings(embeddings)
            given = before
        items = [item for item in items if item.rank > 0]
        shortcuts = list[_Module]()
        is_block = bool(module.path) and _RESIDUAL_BLOCK.fullmatch(module.stem[0]) is not None
        if is_block:
            shortcuts = [item for item in items if _SHORTCUT.fullmatch(item.stem[0])]
            items = [item for item in items if item not in shortcuts]
        streams = [before] if before is not None else []
        for group in _groups_in_order(items, before):
            start = before
            for item in group:
                before = self.read(item, before)
                assert before is not None
                if item.matrix is not None:
                    outputs.append(before)
            assert before is not None
            if start is not None and before.size == start.size and len(group) > 1:
                self.residual.append([start.name, before.name])  # Around the dense layers after attention.
            streams.append(before)
        if is_block and before is not None and given is not None:
            if shortcuts:
                self._read_shortcut(shortcuts, norms, given, before)
                norms = [norm for norm in norms if not _SHORTCUT.fullmatch(norm.stem[0])]
            elif given.size == before.size:
                self.residual.append([given.name, before.name])
        self._place_norms(norms, outputs, streams if module.has_attention else [])
        return before

    def _read_embeddings(self, embeddings: Sequence[_Module]) -> _Neurons:
        """Tables of tokens and of positions, which are added up."""
        is_position = [_POSITION.fullmatch(module.stem[0]) is not None for module in embeddings]
        tokens = [module for module, position in zip(embeddings, is_position, strict=True) if not position]
        first = (tokens or list(embeddings))[0]
        neurons = self._read_matrix(first, None)
        for module, position in zip(embeddings, is_position, strict=True):
            matrix = module.matrix
            assert matrix is not None
            if _sizes(matrix)[2] != neurons.size:
                _refuse(matrix, f"it has {_sizes(matrix)[2]} features where another table has {neurons.size}")
            self.edges[matrix.path] = [f"{module.label} inputs", neurons.name]
            if position:
                self.kinds[matrix.path] = "position"
        return neurons

    def _read_shortcut(
        self, shortcuts: Sequence[_Module], norms: Sequence[_Module], given: _Neurons, after: _Neurons
    ) -> None:
        """A projection from what a block is given to what it gives out."""
        matrix = shortcuts[0].matrix
        if len(shortcuts) > 1 or matrix is None or _sizes(matrix)[1:] != (given.size, after.size):
            _refuse(shortcuts[-1].first, "it is no projection from the input of its block to the output")
        self.edges[matrix.path] = [given.name, after.name]
        vectors = [
            *shortcuts[0].vectors,
            *(x for norm in norms if _SHORTCUT.fullmatch(norm.stem[0]) for x in norm.vectors),
        ]
        for vector in vectors:
            self.edges[vector.path] = [after.name]

    def _place_norms(self, norms: Sequence[_Module], outputs: Sequence[_Neurons], streams: Sequence[_Neurons]) -> None:
        """Normalisation layers belong to neurons of their size: as many layers as there are such, in their order."""
        by_size: dict[int, list[_Module]] = {}
        for norm in norms:
            by_size.setdefault(_sizes(norm.vectors[0])[2], []).append(norm)
        for size, alike in by_size.items():
            # Those of the layers beside; those along the stream of a transformer; its end.
            own, along = ([neurons for neurons in each if neurons.size == size] for each in (outputs, streams))
            candidates = (own, along, along[:-1], along[-1:])
            neurons = next((each for each in candidates if len(each) == len(alike)), None)
            if neurons is None:
                _refuse(alike[0].vectors[0], f"there are {len(own)} layers of its size, and {len(alike)} such norms")
            for norm, place in zip(alike, neurons, strict=True):
                for vector in norm.vectors:
                    self.edges[vector.path] = [place.name]


_PARTS = {"query": QUERY, "key": KEY, "value": VALUE, "out": OUT}


def _groups_in_order(items: Sequence[_Module], before: _Neurons | None) -> list[list[_Module]]:
    """The order of modules, in groups of one; in a transformer, dense layers that follow attention are a group."""
    attention = sorted((item for item in items if item.is_attention), key=lambda item: item.stem)
    if attention:
        others = sorted((item for item in items if not item.is_attention), key=lambda item: item.stem)
        pairs = 2 * len(attention)
        if all(item.matrix is not None for item in others) and len(others) in (pairs, pairs + 1):
            dense = [_dense_in_order(others[start : start + 2], before) for start in range(0, pairs, 2)]
            last = [[item] for item in others[pairs:]]
        elif len(others) == len(attention) and all(item.children for item in others):
            dense, last = [_dense_in_order(list(item.children.values()), before) for item in others], []
        else:
            reason = f"{len(others)} modules are beside {len(attention)} of attention, where a transformer has two"
            _refuse((others or attention)[0].first, reason)
        return [*(group for one, two in zip(attention, dense, strict=True) for group in ([one], two)), *last]
    return [[item] for item in _only_order(items, before)]


def _dense_in_order(layers: Sequence[_Module], before: _Neurons | None) -> list[_Module]:
    """The dense layers of a block of a transformer."""
    for layer in layers:
        if layer.matrix is None or layer.children:
            _refuse(layer.first, "it is not one of the dense layers after attention")
    return _only_order(layers, before)


def _only_order(items: Sequence[_Module], before: _Neurons | None) -> list[_Module]:
    """The order of modules, if there is one and no other."""
    # Flax numbers modules as they are made: in `Dense(10)(Dense(32)(x))` the last layer is made first.
    for is_numbered in (True, False):
        orders = list(itertools.islice(_orders(items, before, is_numbered=is_numbered), 2))
        if len(orders) == 1:
            return orders[0]
        if orders:
            one, other = next((a, b) for a, b in zip(*orders, strict=True) if a is not b)
            _refuse(one.first, f"its module could come before {other.label!r} or after it")
    return _refuse(_first_misfit(items, before).first, "its inputs are the outputs of no layer before it")


def _orders(items: Sequence[_Module], before: _Neurons | None, *, is_numbered: bool) -> Iterator[list[_Module]]:
    """The orders in which every module is given what the one before it gives out.

    Args:
      items: the modules.
      before: what the first is given, or `None`.
      is_numbered: whether dense layers of one name come in the order of their numbers, as all others do.
    """
    if not items:
        yield []
        return
    lowest = min(item.rank for item in items)
    for item in _next_of(items, is_numbered=is_numbered):
        if item.rank > lowest:
            continue
        others = [other for other in items if other is not item]
        for after in _outputs(item, before):
            for order in _orders(others, after, is_numbered=is_numbered):
                yield [item, *order]


def _next_of(items: Sequence[_Module], *, is_numbered: bool) -> list[_Module]:
    """The first of each name, and of dense layers all if their numbers mean nothing."""
    ordered = sorted(items, key=lambda item: item.stem)
    firsts = [next(group) for _, group in itertools.groupby(ordered, key=lambda item: item.stem[0])]
    return firsts if is_numbered else [item for item in ordered if item in firsts or item.rank > 1]


def _outputs(item: _Module, before: _Neurons | None) -> Iterator[_Neurons]:
    """What a module gives out, if it can be given these neurons."""
    matrix = item.matrix
    if matrix is not None and not item.children:
        _, rows, columns = _sizes(matrix)
        fits = before is None or rows == before.size
        if before is not None and not fits:
            is_flattened = matrix.role == "dense" and before.is_image and rows % before.size == 0
            is_depthwise = matrix.role == "conv" and rows == 1 and columns == before.size
            fits = is_flattened or is_depthwise
        if fits:
            yield _Neurons(item.label, columns, is_image=matrix.role == "conv")
        return
    children = [child for child in item.children.values() if not child.is_norm]
    if item.has_attention:
        # A transformer's block gives out as many neurons as it is given.
        if before is not None:
            yield dataclasses.replace(before, name=item.label)
        return
    if item.path and _RESIDUAL_BLOCK.fullmatch(item.stem[0]):
        children = [child for child in children if not _SHORTCUT.fullmatch(child.stem[0])]
    for order in itertools.islice(_orders(children, before, is_numbered=True), 1):
        after = before
        for child in order:
            after = next(_outputs(child, after))
        if after is not None:
            yield dataclasses.replace(after, name=item.label)


def _first_misfit(items: Sequence[_Module], before: _Neurons | None) -> _Module:
    """The module at which the longest order ends."""
    longest: list[_Module] = []

    def extend(order: list[_Module], rest: Sequence[_Module], before: _Neurons | None) -> None:
        nonlocal longest
        if len(order) > len(longest):
            longest = order
        for item in _next_of(rest, is_numbered=True):
            for after in itertools.islice(_outputs(item, before), 1):
                extend([*order, item], [other for other in rest if other is not item], after)

    extend([], items, before)
    return min((item for item in items if item not in longest), key=lambda item: (item.rank, item.stem))


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    return layout_of(tensor.names, tensor.shape, tensor.role).sizes(tensor.shape)


def _refuse(tensor: Tensor, reason: str) -> NoReturn:
    raise ValueError(
        f"NiNo cannot tell how the model is connected at the leaf {tensor.path!r} of shape {tensor.shape}: {reason}. "
        f"{_REMEDY}"
    )
