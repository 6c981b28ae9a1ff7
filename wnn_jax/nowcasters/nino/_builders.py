"""Describe models that are chains of layers, residual networks or transformers, by the names of their modules.

All names that count are listed here, for Flax linen, Flax nnx and Equinox. A model with any other module is refused.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from wnn_jax.nowcasters.nino._description import split_tensors
from wnn_jax.nowcasters.nino._graph import FUSED, PARTS, Tensor

# Names without numbers and underscores. In a chain, layers come in the order of these sets, and then of their numbers.
_RANKS = {
    "first": {"convinit", "stem"},
    "conv": {"conv", "convs", "conv1d", "conv2d", "convnorm", "convbn", "layers"},
    "block": {"resnetblock", "resblock", "residualblock", "basicblock", "bottleneckresnetblock"},
    "dense": {"dense", "linear", "linears", "fc", "layers", ""},
    "head": {"head", "classifier", "lmhead"},
}
_ROLES = {"first": "conv", "conv": "conv", "dense": "dense", "head": "dense"}
# What holds layers and has no connection around them.
_CONTAINERS = {"params", "model", "net", "network", "sequential", "mlp"}
_SHORTCUTS, _SHORTCUT_NORMS = {"convproj", "shortcut", "downsample"}, {"normproj", "shortcutnorm", "downsamplenorm"}
_NORM = re.compile(r".*norms?|(bn|ln|gn).*|norm(init|f|proj)")
_FIRST_NORMS = {"bninit", "norminit"}
_ATTENTION_NORMS = {"attentionnorm", "selfattentionnorm", "inputlayernorm"}
_HIDDEN_NORMS = {"mlpnorm", "ffnnorm", "feedforwardnorm", "postattentionlayernorm"}
_LAST_NORMS = {"lnf", "normf", "finalnorm", "layernorm", "norm", "norms", "rmsnorm"}
_POSITION = re.compile(r"wpe|.*pos.*emb.*")
# Convolutions with so few outputs may make an image. Then the dense layers come before them.
_MAX_IMAGE_CHANNELS = 4
_REMEDY = (
    "Give NiNo(graph={'edges': {...}}), which names for the path of each leaf the neurons that its edges lead from and "
    "to; wnn_jax.nowcasters.neural_graph says how."
)


def build_description(
    tensors: Sequence[Tensor], paths: Sequence[tuple[str, ...]], num_heads: int | None = None
) -> dict[str, Any]:
    """Describe how a model is connected, see `neural_graph`, from its leaves and the names along their paths."""
    fused = [tensor for tensor, path in zip(tensors, paths, strict=True) if path[-2:-1] and path[-2] in FUSED]
    parts = {tensor.path: list(PARTS)[:3] for tensor in fused if _has_thirds(tensor)}
    pieces = split_tensors(parts, tensors)
    root = _Module()
    for piece in pieces:
        modules = paths[piece.leaf][:-1]
        if piece.axis is not None:  # A part is read as if it had a module of its own.
            modules = (*modules[:-1], piece.tensor.path.rpartition(":")[2])
        # Items of a list are numbered as Flax numbers modules.
        path = re.sub(r"/(?=\d+(/|$))", "_", "/".join(modules))
        root.inner(path.split("/") if modules else []).tensors.append(piece.tensor)
    builder = _Builder(num_heads)
    if any(module.is_attention for module in root.walk()):
        builder.read_transformer(root)
    else:
        builder.read_chain(root.parts if root.children or not root.tensors else [root], None)
    for tensor in (piece.tensor for piece in pieces):
        if tensor.path not in builder.edges or 0 in tensor.shape:
            _refuse(tensor, "it is empty" if 0 in tensor.shape else "no builder knows what it is for")
    optional = {"parts": parts, "residual": builder.residual, "heads": builder.heads, "kinds": builder.kinds}
    return {"edges": builder.edges, **{name: part for name, part in optional.items() if part}}


def _has_thirds(tensor: Tensor) -> bool:
    """Whether the outputs can be queries, keys and values: in one axis, or with an axis of three before the heads."""
    columns = [tensor.shape[axis] for axis in tensor.axes[2]]
    return columns[0] == 3 if len(columns) == 3 else len(columns) == 1 and columns[0] % 3 == 0


class _Module:
    """A module of the model: its own tensors, and the modules in it by name."""

    def __init__(self, path: tuple[str, ...] = ()) -> None:
        name = path[-1] if path else ""
        stem = name.rstrip("0123456789")
        self.kind, self.number = stem.replace("_", ""), int(name[len(stem) :] or 0)
        self.path, self.label = path, "/".join(path) or "model"
        self.tensors: list[Tensor] = []
        self.children: dict[str, _Module] = {}

    def inner(self, names: Sequence[str]) -> "_Module":
        """Return the module that some names lead to."""
        module = self
        for name in names:
            module = module.children.setdefault(name, _Module((*module.path, name)))
        return module

    def walk(self) -> list["_Module"]:
        """Return itself and all modules in it."""
        return [self, *(module for child in self.children.values() for module in child.walk())]

    @property
    def parts(self) -> list["_Module"]:
        """The modules in it, without containers."""
        parts: list[_Module] = []
        for child in self.children.values():
            parts += child.parts if child.kind in _CONTAINERS and not child.tensors else [child]
        return parts

    @property
    def layers(self) -> list["_Module"]:
        """The modules in it, or itself, that have a matrix of their own."""
        return [module for module in self.walk() if not all(tensor.is_vector for tensor in module.tensors)]

    @property
    def matrix(self) -> Tensor:
        """Its first matrix, or its first vector if it has no matrix."""
        return min((tensor for module in self.walk() for tensor in module.tensors), key=lambda tensor: tensor.is_vector)

    @property
    def is_norm(self) -> bool:
        return not self.layers and _NORM.fullmatch(self.kind) is not None

    @property
    def is_attention(self) -> bool:
        return all(set(PARTS[part]) & self.children.keys() for part in ("query", "key", "value"))


class _Neurons(NamedTuple):
    """The output of a layer."""

    name: str
    size: int
    is_image: bool = False


class _Builder:
    """The parts of a description, as far as modules were read."""

    def __init__(self, num_heads: int | None) -> None:
        self.edges: dict[str, list[str]] = {}
        self.residual: list[list[str]] = []
        self.heads: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self._num_heads = num_heads

    def read_chain(self, modules: Sequence[_Module], before: _Neurons | None) -> _Neurons | None:
        """Read layers and residual blocks that follow one another."""
        ranked = [(_rank(module), module) for module in modules if not module.is_norm]
        groups = {rank: _in_order([module for actual, module in ranked if actual == rank]) for rank in _RANKS}
        in_list = [module for rank in ("conv", "dense") for module in groups[rank] if module.kind == "layers"]
        if _in_order(in_list) != in_list:
            _refuse(in_list[0].matrix, "a dense layer comes before it")
        outputs: list[_Neurons] = []
        for rank, group in groups.items():
            read = self._read_block if rank == "block" else self._read_layer
            for module in _order_dense(group, groups["head"], before) if rank == "dense" else group:
                before = read(module, before)
                outputs.append(before)
        norms = [module for module in modules if module.is_norm]
        for norm in [norm for norm in norms if norm.kind in _FIRST_NORMS and outputs]:
            self._place(norm, outputs[0])
            norms.remove(norm)
        for size in dict.fromkeys(map(_num_outputs, norms)):
            group = _in_order([norm for norm in norms if _num_outputs(norm) == size])
            places = [neurons for neurons in outputs if neurons.size == size]
            if len(places) != len(group):
                _refuse(group[0].matrix, f"there are {len(places)} layers of its size, and {len(group)} such norms")
            for norm, place in zip(group, places, strict=True):
                self._place(norm, place)
        return before

    def _read_layer(self, module: _Module, before: _Neurons | None) -> _Neurons:
        """Read a module with one matrix, and its vectors."""
        if len(module.layers) != 1:
            _refuse(module.matrix, f"its module has {len(module.layers)} layers, which may be connected in any way")
        matrix, is_image = module.matrix, module.matrix.role == "conv"
        if not _fits([module], before):
            _refuse(matrix, "its inputs are not the outputs of the layer before it")
        if before is not None and before.is_image and not is_image and before.size <= _MAX_IMAGE_CHANNELS:
            _refuse(matrix, "it may come before the convolutions, which then make an image of its outputs")
        neurons = _Neurons(module.layers[0].label, _num_outputs(module), is_image)
        self.edges[matrix.path] = ["input" if before is None else before.name, neurons.name]
        self._place(module, neurons)
        return neurons

    def _read_block(self, block: _Module, before: _Neurons | None) -> _Neurons:
        """Read a residual block: a chain, and a connection around it or a projection."""
        shortcuts = [module for module in block.parts if module.kind in _SHORTCUTS]
        norms = [module for module in block.parts if module.kind in _SHORTCUT_NORMS]
        after = self.read_chain([module for module in block.parts if module not in (*shortcuts, *norms)], before)
        if before is None or after is None:
            _refuse(block.matrix, "its residual block has no layer before it, or no layer")
        if not shortcuts and before.size == after.size:
            self.residual.append([before.name, after.name])
        elif len(shortcuts) != 1 or shortcuts[0].matrix.sizes[1:] != [before.size, after.size]:
            _refuse(block.matrix, "its residual block has no projection from its input to its output")
        for shortcut in shortcuts:
            self.edges[shortcut.matrix.path] = [before.name, after.name]
            for module in (shortcut, *norms):
                self._place(module, after)
        return after

    def _place(self, module: _Module, neurons: _Neurons) -> None:
        """Put the vectors of a module at some neurons."""
        for vector in (tensor for inner in module.walk() for tensor in inner.tensors if tensor.is_vector):
            if vector.sizes[2] != neurons.size:
                _refuse(vector, f"it has {vector.sizes[2]} elements for {neurons.size} neurons")
            self.edges[vector.path] = [neurons.name]

    def read_transformer(self, root: _Module) -> None:
        """Read a transformer as GPT-2 is, with normalisation before each part and at the end, or without any."""
        tables = [module for module in root.parts if module.matrix.role == "embedding"]
        blocks = [module for module in root.parts if any(inner.is_attention for inner in module.walk())]
        blocks, norms = _in_order(blocks), [module for module in root.parts if module.is_norm]
        dense = [module for module in root.parts if module not in (*tables, *blocks, *norms)]
        tokens = [module for module in tables if not _POSITION.fullmatch(module.kind)]
        if len(tokens) != 1 or len(tables) > 2 or len(set(map(_num_outputs, tables))) > 1:
            reason = "a transformer begins with a table of tokens and at most one of positions, of as many features"
            _refuse((tables or blocks)[0].matrix, reason)
        before = _Neurons(tokens[0].label, _num_outputs(tokens[0]))
        for module in tables:
            self.edges[module.matrix.path] = [f"{module.label} inputs", before.name]
            if module is not tokens[0]:
                self.kinds[module.matrix.path] = "position"
        groups = [block.parts for block in blocks]
        if blocks[0].is_attention:  # The layers of all blocks lie side by side.
            last = [module for module in (*dense, *norms) if module.kind in (*_RANKS["head"], "lnf")]
            dense = _in_order([module for module in dense if module not in last])
            norms = _in_order([module for module in norms if module not in last])
            pairs = [slice(2 * index, 2 * index + 2) for index in range(len(blocks))]
            groups = [[block, *dense[pair], *norms[pair]] for block, pair in zip(blocks, pairs, strict=True)]
            rest = [*dense[pairs[-1].stop :], *norms[pairs[-1].stop :], *last]
            dense, norms = ([module for module in rest if module.is_norm is is_norm] for is_norm in (False, True))
        for group in groups:
            before = self._read_transformer_block(group, before, 2 if norms else 0)
        unknown = [*dense[1:], *norms[1:], *(norm for norm in norms if norm.kind not in _LAST_NORMS)]
        unknown += [module for module in dense if _rank(module) not in ("dense", "head")]
        if unknown:
            _refuse(unknown[0].matrix, "a transformer ends in one normalisation layer and one dense layer")
        for norm in norms:
            self._place(norm, before)
        for head in dense:
            self._read_layer(head, before)

    def _read_transformer_block(self, modules: Sequence[_Module], before: _Neurons, num_norms: int) -> _Neurons:
        """Read attention and two dense layers, with a connection around each of these."""
        attention = [module for module in modules if module.is_attention]
        norms = [module for module in modules if module.is_norm]
        dense = [module for module in modules if module not in (*attention, *norms)]
        if len(dense) == 1 and not dense[0].tensors:
            dense = dense[0].parts
        if (len(attention), len(dense), len(norms)) != (1, 2, num_norms):
            reason = (
                f"its block has {len(attention)} attention, {len(dense)} dense and {len(norms)} normalisation layers, "
                f"where the transformer that a builder knows has 1, 2 and {num_norms}"
            )
            _refuse([*dense, *norms, *attention][0].matrix, reason)
        norms = sorted(norms, key=lambda norm: (norm.kind in _HIDDEN_NORMS, norm.number))
        if norms and not (norms[0].kind in _ATTENTION_NORMS and norms[1].kind in _HIDDEN_NORMS):
            norms = _in_order(norms)
        middle = self._read_attention(attention[0], before)
        for norm, place in zip(norms, (before, middle), strict=False):
            self._place(norm, place)
        up, down = sorted(dense, key=lambda layer: not _fits([layer], middle))
        if _fits([down], middle):
            _refuse(up.matrix, f"its module could come before {down.label!r} or after it")
        after = self._read_layer(down, self._read_layer(up, middle))
        if after.size != before.size:
            _refuse(down.matrix, f"it has {after.size} outputs where the blocks have {before.size} features")
        self.residual += [[before.name, middle.name], [middle.name, after.name]]
        return after

    def _read_attention(self, module: _Module, before: _Neurons) -> _Neurons:
        """Read the four projections of attention."""
        query, value = f"{module.label} queries", f"{module.label} values"
        # Queries and keys are multiplied: they are the same neurons, through which the edges of keys lead back.
        ends = {"query": (before.name, query), "key": (query, before.name), "value": (before.name, value)}
        sizes: dict[str, int] = {}
        for name, (source, target) in {**ends, "out": (value, module.label)}.items():
            part = next((module.children[known] for known in PARTS[name] if known in module.children), None)
            if part is None or len(part.layers) != 1:
                _refuse(module.matrix, f"its attention has no {'projection back' if name == 'out' else name}")
            _, rows, sizes[name] = part.matrix.sizes
            expected = sizes["value"] if name == "out" else before.size
            outputs = {"key": sizes["query"], "out": before.size}.get(name, sizes[name])
            if (rows, sizes[name]) != (expected, outputs):
                _refuse(part.matrix, f"it is {rows} x {sizes[name]} where its attention has {expected} x {outputs}")
            self.edges[part.matrix.path] = [source, target]
            self._place(part, _Neurons(source if name == "key" and outputs != before.size else target, outputs))
            if name != "out":
                self.kinds[part.matrix.path] = name
            if name in ("query", "value"):
                self.heads[target] = self._num_heads_of(part.matrix)
        return _Neurons(module.label, before.size)

    def _num_heads_of(self, matrix: Tensor) -> int:
        if len(matrix.shape) > 2:
            return matrix.shape[-2]
        if self._num_heads is None:
            remedy = "Give it: NiNo(graph=wnn_jax.nowcasters.neural_graph(params, num_heads=...))."
            _refuse(matrix, "no shape tells how many heads its attention has", remedy)
        if matrix.sizes[2] % self._num_heads:
            _refuse(matrix, f"its {matrix.sizes[2]} outputs are not those of num_heads={self._num_heads} heads")
        return self._num_heads


def _rank(module: _Module) -> str:
    """The place of a module in a chain: a key of `_RANKS`."""
    role = module.matrix.role
    ranks = [rank for rank, kinds in _RANKS.items() if module.kind in kinds and _ROLES.get(rank, role) == role]
    if not ranks:
        _refuse(module.matrix, f"no builder knows the name {module.label!r} for a module with a leaf of role {role!r}")
    return ranks[0]


def _in_order(modules: Sequence[_Module]) -> list[_Module]:
    """Modules of one name, in the order of their numbers."""
    ordered = sorted(modules, key=lambda module: module.number)
    for one, other in itertools.pairwise(ordered):
        if one.kind != other.kind or one.number == other.number:
            _refuse(one.matrix, f"its module could come before {other.label!r} or after it")
    return ordered


def _order_dense(dense: list[_Module], heads: list[_Module], before: _Neurons | None) -> list[_Module]:
    """Dense layers in the order of their numbers, or in the reverse order if only this order fits.

    Flax numbers modules as they are made: in `Dense(10)(Dense(32)(x))` the last layer is made first.
    """
    is_flax = len(dense) > 1 and all(layer.path[-1].startswith("dense_") for layer in dense)
    if not is_flax or not _fits([*dense[::-1], *heads], before):
        return dense
    if _fits([*dense, *heads], before):
        _refuse(dense[0].matrix, f"its module could come before {dense[1].label!r} or after it")
    return dense[::-1]


def _fits(layers: Sequence[_Module], before: _Neurons | None) -> bool:
    """Whether each layer can be given the outputs of the layer before it. A dense layer may be given all positions."""
    for layer in layers:
        rows, is_image = layer.matrix.sizes[1], layer.matrix.role == "conv"
        if before is not None and rows != before.size and (is_image or not before.is_image or rows % before.size):
            return False
        if before is not None and is_image and not before.is_image:
            return False
        before = _Neurons(layer.label, _num_outputs(layer), is_image)
    return True


def _num_outputs(module: _Module) -> int:
    return module.matrix.sizes[2]


def _refuse(tensor: Tensor, reason: str, remedy: str = _REMEDY) -> NoReturn:
    raise ValueError(
        f"NiNo cannot tell how the model is connected at the leaf {tensor.path!r} of shape {tensor.shape}: {reason}. "
        f"{remedy}"
    )
