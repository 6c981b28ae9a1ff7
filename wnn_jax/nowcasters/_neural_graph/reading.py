"""Reading the neural graph of a model from the names and the shapes of its parameters."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from wnn_jax.nowcasters._neural_graph import names
from wnn_jax.nowcasters._neural_graph.building import split_tensors
from wnn_jax.nowcasters._neural_graph.graph import KEY, OUT, QUERY, VALUE, Tensor, layout_of
from wnn_jax.nowcasters._neural_graph.modules import (
    Module,
    Neurons,
    fits_in_a_row,
    groups_in_order,
    module_tree,
    norms_in_order,
    refuse,
    sizes_of,
)

_POSITION = re.compile(r"wpe|.*pos.*emb.*")
_INPUT = "input"
# What has queries, keys and values in this order in one layer calls the projection back by other names.
_FUSED, _FUSED_PARTS, _FUSED_OUT = ("c_attn", "qkv"), ("query", "key", "value"), ("c_proj", "proj")
_PARTS = {"query": QUERY, "key": KEY, "value": VALUE, "out": (*OUT, *_FUSED_OUT)}
_NUM_HEADS_REMEDY = "Give it: NiNo(graph=wnn_jax.nowcasters.neural_graph(params, num_heads=...))."


def read_graph(
    tensors: Sequence[Tensor], paths: Sequence[tuple[str, ...]], num_heads: int | None = None
) -> dict[str, Any]:
    """Reads how a model is connected: see `wnn_jax.nowcasters.neural_graph`.

    Args:
      tensors: the leaves of the parameters.
      paths: the names along the path of each, in lower case, without the classes of modules.
      num_heads: of attention, where no shape tells it.

    Raises:
      ValueError: if it cannot be read, naming a leaf.
    """
    for tensor in tensors:
        if 0 in tensor.shape:
            refuse(tensor, "it is empty")
    parts = {
        tensor.path: list(_FUSED_PARTS)
        for tensor, path in zip(tensors, paths, strict=True)
        if len(path) > 1 and path[-2] in _FUSED and _has_thirds(tensor)
    }
    pieces, split = split_tensors(parts, tensors)
    # A part is read as if it had a module of its own.
    modules = [
        (*paths[leaf][:-2], tensor.path.rpartition(":")[2], paths[leaf][-1]) if axis is not None else paths[leaf]
        for (leaf, axis, *_), tensor in zip(pieces, split, strict=True)
    ]
    reader = _Reader(num_heads)
    reader.read(module_tree(split, modules), None)
    unread = [tensor for tensor in split if tensor.path not in reader.edges]
    if unread:
        refuse(unread[0], "it belongs to nothing that is known")
    description: dict[str, Any] = {"edges": reader.edges}
    if parts:
        description["parts"] = parts
    for name in ("residual", "heads", "kinds"):
        if part := getattr(reader, name):
            description[name] = part
    return description


def _has_thirds(tensor: Tensor) -> bool:
    """Whether its outputs are three times as many as those of a part: on one axis, or on the one before the heads."""
    columns = [tensor.shape[axis] for axis in layout_of(tensor.names, tensor.shape, tensor.role).columns]
    return columns[:1] == [3] if len(columns) == 3 else len(columns) == 1 and columns[0] % 3 == 0


@dataclasses.dataclass
class _Reader:
    """What was read: the parts of a description.

    Attributes:
      num_heads: of attention, where no shape tells it.
    """

    num_heads: int | None = None
    edges: dict[str, list[str]] = dataclasses.field(default_factory=dict[str, list[str]])
    residual: list[list[str]] = dataclasses.field(default_factory=list[list[str]])
    heads: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    kinds: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def read(self, module: Module, before: Neurons | None) -> Neurons | None:
        """Reads a module that is given some neurons, or is the first, and returns what it gives out."""
        if module.tensors and not module.children and module.matrix is not None:
            return self._read_matrix(module, before)
        if module.is_attention:
            return self._read_attention(module, before)
        return self._read_container(module, before)

    def _read_matrix(self, module: Module, before: Neurons | None) -> Neurons:
        matrix = module.matrix
        assert matrix is not None
        _, rows, columns = sizes_of(matrix)
        if before is None:
            name = f"{module.label} inputs" if matrix.role == "embedding" else _INPUT
            before = Neurons(name, rows, is_image=False)
        self.edges[matrix.path] = [before.name, module.label]
        for vector in module.vectors:
            self.edges[vector.path] = [module.label]
        return Neurons(module.label, columns, is_image=matrix.role == "conv")

    def _read_attention(self, module: Module, before: Neurons | None) -> Neurons:
        parts = {name: module.part(names) for name, names in _PARTS.items()}
        if before is None or parts["out"] is None:
            refuse(module.first, f"its attention has no {'input' if before is None else 'projection back'}")
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
                refuse(part.first, "it is no matrix of attention")
            _, rows, sizes[name] = sizes_of(matrix)
            expected = before.size if name != "out" else sizes["value"]
            if rows != expected:
                refuse(matrix, f"it has {rows} inputs where there are {expected} neurons")
            self.edges[matrix.path] = ends[name]
            if name != "out":
                self.kinds[matrix.path] = name
            for vector in part.vectors:
                self.edges[vector.path] = [ends[name][1 if name != "key" or sizes[name] == before.size else 0]]
            if name in ("query", "value"):
                self.heads[ends[name][1]] = self._num_heads_of(matrix)
        if sizes["key"] != sizes["query"]:
            key = parts["key"]
            assert key is not None
            refuse(key.first, f"it has {sizes['key']} outputs where there are {sizes['query']} queries")
        if sizes["out"] == before.size:
            self.residual.append([before.name, module.label])
        return Neurons(module.label, sizes["out"], is_image=False)

    def _num_heads_of(self, matrix: Tensor) -> int:
        """How many heads queries or values belong to."""
        if len(matrix.shape) > 2:
            return matrix.shape[-2]
        if self.num_heads is None:
            refuse(matrix, "no shape tells how many heads its attention has", _NUM_HEADS_REMEDY)
        _, _, columns = sizes_of(matrix)
        if columns % self.num_heads:
            refuse(matrix, f"its {columns} outputs are not those of num_heads={self.num_heads} heads")
        return self.num_heads

    def _read_container(self, module: Module, before: Neurons | None) -> Neurons | None:
        if module.tensors:
            refuse(module.tensors[0], "it lies beside other modules")
        if module.is_called(names.ATTENTION) and not module.has_attention:
            refuse(module.first, "it is in what is called attention, which has no queries, keys and values")
        norms = [child for child in module.children.values() if child.is_norm]
        items = [child for child in module.children.values() if not child.is_norm]
        given, outputs = before, list[Neurons]()
        embeddings = [item for item in items if item.rank == 0]
        if embeddings:
            before = self._read_embeddings(embeddings)
            given = before
        items = [item for item in items if item.rank > 0]
        shortcuts = list[Module]()
        if module.is_called(names.RESIDUAL_BLOCK):
            shortcuts = [item for item in items if item.is_called(names.SHORTCUT)]
            if any(item.is_called(names.PROJECTION) for item in shortcuts) and fits_in_a_row(items, before):
                refuse(shortcuts[0].first, "it may be a layer of its block or the projection beside it")
            items = [item for item in items if not item.is_called(names.SHORTCUT)]
        stream = _Stream(has_blocks=not any(item.is_attention for item in items))
        for group in groups_in_order(items, before):
            start = before
            for item in group:
                before = self.read(item, before)
                assert before is not None
                if item.matrix is not None:
                    outputs.append(before)
            assert before is not None
            if start is not None and len(group) > 1:  # Around the dense layers after attention.
                if before.size != start.size:
                    refuse(group[-1].first, f"it has {before.size} outputs where the stream has {start.size} features")
                self.residual.append([start.name, before.name])
            if start is not None and (len(group) > 1 or group[0].has_attention):
                stream.places.append(start)
                stream.end = before
        if before is not None and given is not None:
            if module.is_some_block and given.size == before.size:
                refuse(module.first, "no name tells whether a residual connection goes around its block")
            if shortcuts:
                self._read_shortcut(shortcuts, norms, given, before)
                norms = [norm for norm in norms if not norm.is_called(names.SHORTCUT)]
            elif module.is_called(names.RESIDUAL_BLOCK) and given.size == before.size:
                self.residual.append([given.name, before.name])
        if module.is_called(names.PREACTIVATED_BLOCK) and given is not None:
            outputs = [given, *outputs[:-1]]
        self._place_norms(norms, outputs, stream)
        return before

    def _read_embeddings(self, embeddings: Sequence[Module]) -> Neurons:
        """Tables of tokens and of positions, which are added up."""
        is_position = [_POSITION.fullmatch(module.stem[0]) is not None for module in embeddings]
        tokens = [module for module, position in zip(embeddings, is_position, strict=True) if not position]
        first = (tokens or list(embeddings))[0]
        neurons = self._read_matrix(first, None)
        for module, position in zip(embeddings, is_position, strict=True):
            matrix = module.matrix
            assert matrix is not None
            if sizes_of(matrix)[2] != neurons.size:
                refuse(matrix, f"it has {sizes_of(matrix)[2]} features where another table has {neurons.size}")
            self.edges[matrix.path] = [f"{module.label} inputs", neurons.name]
            if position:
                self.kinds[matrix.path] = "position"
        return neurons

    def _read_shortcut(
        self, shortcuts: Sequence[Module], norms: Sequence[Module], given: Neurons, after: Neurons
    ) -> None:
        """A projection from what a block is given to what it gives out."""
        matrix = shortcuts[0].matrix
        if len(shortcuts) > 1 or matrix is None or sizes_of(matrix)[1:] != (given.size, after.size):
            refuse(shortcuts[-1].first, "it is no projection from the input of its block to the output")
        self.edges[matrix.path] = [given.name, after.name]
        vectors = [
            *shortcuts[0].vectors,
            *(x for norm in norms if norm.is_called(names.SHORTCUT) for x in norm.vectors),
        ]
        for vector in vectors:
            self.edges[vector.path] = [after.name]

    def _place_norms(self, norms: Sequence[Module], outputs: Sequence[Neurons], stream: "_Stream") -> None:
        """Normalisation layers belong to neurons of their size: as many layers as there are such, in their order."""
        by_size: dict[int, list[Module]] = {}
        for norm in norms:
            if not norm.vectors[0].shape:
                refuse(norm.vectors[0], "it is one number, which belongs to no neuron")
            by_size.setdefault(sizes_of(norm.vectors[0])[2], []).append(norm)
        for size, alike in by_size.items():
            alike = norms_in_order(alike)
            if stream.end is not None and stream.end.size == size:
                places = stream.places_of(alike)
            else:
                places = [neurons for neurons in outputs if neurons.size == size]
            if len(places) != len(alike):
                where = "layers of its size" if stream.end is None else "places for it"
                refuse(alike[0].vectors[0], f"there are {len(places)} {where}, and {len(alike)} such norms")
            for norm, place in zip(alike, places, strict=True):
                for vector in norm.vectors:
                    self.edges[vector.path] = [place.name]


@dataclasses.dataclass
class _Stream:
    """What a transformer adds to: where it is given to attention, to dense layers, or to whole blocks, and its end.

    Attributes:
      has_blocks: whether those are blocks.
      places: what each of them is given.
      end: what the last one gives out, or `None` if there are none.
    """

    has_blocks: bool
    places: list[Neurons] = dataclasses.field(default_factory=list[Neurons])
    end: Neurons | None = None

    def places_of(self, norms: Sequence[Module]) -> list[Neurons]:
        """Where normalisation layers are: before each part, and at the end, or there alone; few where none fit."""
        assert self.end is not None
        inner = [] if self.has_blocks else self.places
        if len(norms) == len(inner) > 0:
            return inner
        if len(norms) == len(inner) + 1 and not norms[0].is_called(names.FIRST_NORM):
            return [*inner, self.end]
        if self.has_blocks and norms[0].is_called(names.FIRST_NORM):
            return [self.places[0], self.end][: len(norms)]
        return [self.end] if len(norms) == 1 and norms[0].is_called(names.LAST_NORM) else []
