"""The modules of a model as the paths of its parameters tell them, and the order in which they follow each other."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from wnn_jax.nowcasters._neural_graph import names
from wnn_jax.nowcasters._neural_graph.graph import KEY, QUERY, VALUE, Tensor, layout_of

# A module's name and the number that tells it from others of its kind.
_NUMBERED = re.compile(r"(.*?)_?(\d*)")
# An image has as many channels at most.
_MAX_IMAGE_CHANNELS = 4

_REMEDY = (
    "Say how the model is connected, with NiNo(graph=...): begin with the description of a model that can be read, see "
    "wnn_jax.nowcasters.neural_graph."
)


@dataclasses.dataclass
class Module:
    """A module: its own tensors, and the modules within.

    Attributes:
      path: the names that lead to it.
      tensors: its own.
      children: the modules within, by name.
    """

    path: tuple[str, ...] = ()
    tensors: list[Tensor] = dataclasses.field(default_factory=list[Tensor])
    children: dict[str, "Module"] = dataclasses.field(default_factory=dict[str, "Module"])

    @property
    def label(self) -> str:
        """Names its neurons."""
        return "/".join(self.path) or "model"

    @property
    def stem(self) -> tuple[str, int]:
        """Its name without its number, and the number."""
        match = _NUMBERED.fullmatch(self.path[-1] if self.path else "")
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

    def is_called(self, pattern: re.Pattern[str]) -> bool:
        """Whether its name, without its number, is of this form."""
        return pattern.fullmatch(self.stem[0]) is not None

    @property
    def is_some_block(self) -> bool:
        """Whether no name tells if there is a residual link around its layers."""
        num_matrices = sum(module.matrix is not None for module in self.walk())
        is_told = self.has_attention or self.is_called(names.RESIDUAL_BLOCK)
        return num_matrices > 1 and not is_told and self.is_called(names.SOME_BLOCK)

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

    def part(self, names: Sequence[str]) -> "Module | None":
        """The child of one of these names."""
        return next((self.children[name] for name in names if name in self.children), None)

    @property
    def first(self) -> Tensor:
        """A tensor to name it by: a matrix, if there is one."""
        tensors = [
            tensor for module in self.walk() for tensor in (module.matrix, *module.tensors) if tensor is not None
        ]
        return next((tensor for tensor in tensors if len(tensor.shape) > 1), tensors[0])

    def walk(self) -> Iterator["Module"]:
        """Itself and all modules within."""
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The output of what was read so far.

    Attributes:
      name: of the neurons.
      size: how many there are.
      is_image: whether there may be a neuron at each of several positions, which a dense layer can be given flattened.
    """

    name: str
    size: int
    is_image: bool


def module_tree(tensors: Sequence[Tensor], paths: Sequence[tuple[str, ...]]) -> Module:
    """The module that all others are in; arguments as of `read_graph`."""
    root = Module()
    for tensor, path in zip(tensors, paths, strict=True):
        module, names = root, _without_lists(path)
        for depth, name in enumerate(names[:-1]):
            module = module.children.setdefault(name, Module(names[: depth + 1]))
        module.tensors.append(tensor)
    return root


def _without_lists(names: Sequence[str]) -> tuple[str, ...]:
    """Names in which the modules of a list are numbered like those of Flax, and lie where the list does."""
    flat: list[str] = []
    for name in names:
        if name.isdigit() and flat:
            flat[-1] += f"_{name}"
        else:
            flat.append(name)
    return tuple(flat)


def norms_in_order(norms: Sequence[Module]) -> list[Module]:
    """Normalisation layers of one size, in the order of their numbers and of what their names say."""
    order: dict[int, str] = {}

    def place_of(norm: Module) -> tuple[int, int]:
        name, number = norm.stem
        place = next((place for place, pattern in enumerate(names.NORMS) if pattern.fullmatch(name)), 1)
        if order.setdefault(place, name) != name:
            refuse(norm.vectors[0], f"it may come before {order[place]!r} or behind it")
        return place, number

    return sorted(norms, key=place_of)


def fits_in_a_row(items: Sequence[Module], before: Neurons | None) -> bool:
    """Whether each of these can be given what another one gives out, in some order."""
    return any(True for _ in _orders(items, before, is_numbered=False))


def groups_in_order(items: Sequence[Module], before: Neurons | None) -> list[list[Module]]:
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
            refuse((others or attention)[0].first, reason)
        return [*(group for one, two in zip(attention, dense, strict=True) for group in ([one], two)), *last]
    return [[item] for item in _only_order(items, before)]


def _dense_in_order(layers: Sequence[Module], before: Neurons | None) -> list[Module]:
    """The two dense layers of a block of a transformer."""
    if len(layers) != 2:
        refuse(layers[0].first, f"there are {len(layers)} layers after attention, where a transformer has two")
    for layer in layers:
        if layer.matrix is None or layer.children:
            refuse(layer.first, "it is not one of the dense layers after attention")
    return _only_order(layers, before)


def _only_order(items: Sequence[Module], before: Neurons | None) -> list[Module]:
    """The order of modules, if there is one and no other."""
    aside = next((item for item in items if item.is_called(names.ASIDE)), None)
    if aside is not None:
        refuse(aside.first, "its name is that of a module beside the layers")
    beside = [item for item in items if item.is_called(names.SIDE_BY_SIDE)]
    if len(beside) > 1:
        refuse(beside[1].first, f"its module may be beside {beside[0].label!r} rather than behind it")
    dense = [item for item in items if item.rank > 1]
    if dense and any(item.matrix is not None and item.is_called(names.TRANSPOSED) for item in items):
        refuse(
            dense[0].first, "it may come before a transposed convolution, and there are no edges for what is reshaped"
        )
    # Flax numbers modules as they are made: in `Dense(10)(Dense(32)(x))` the last layer is made first.
    for is_numbered in (True, False):
        orders = list(itertools.islice(_orders(items, before, is_numbered=is_numbered), 2))
        if len(orders) == 1:
            if _may_be_generator(orders[0], before):
                refuse(dense[0].first, "it may come before the convolutions, which would be given its outputs reshaped")
            return orders[0]
        if orders:
            one, other = next((a, b) for a, b in zip(*orders, strict=True) if a is not b)
            refuse(one.first, f"its module could come before {other.label!r} or after it")
    return refuse(_first_misfit(items, before).first, "its inputs are the outputs of no layer before it")


def _may_be_generator(order: Sequence[Module], before: Neurons | None) -> bool:
    """Whether its dense layers could come first as well: they would make an image, and the convolutions another."""
    images = list(itertools.takewhile(lambda item: item.rank < 2, order))
    kernels, dense = (
        [module.matrix for item in items for module in item.walk() if module.matrix is not None]
        for items in (images, order[len(images) :])
    )
    if before is not None or not dense or not kernels:
        return False
    channels, outputs = sizes_of(kernels[0])[1], sizes_of(dense[-1])[2]
    last, flattened = sizes_of(kernels[-1])[2], sizes_of(dense[0])[1]
    if channels == 1 or outputs % channels or last > _MAX_IMAGE_CHANNELS or flattened == last:
        return False
    num_positions = outputs // channels
    return num_positions > 1 and (len(kernels[0].shape) != 4 or math.isqrt(num_positions) ** 2 == num_positions)


def _orders(items: Sequence[Module], before: Neurons | None, *, is_numbered: bool) -> Iterator[list[Module]]:
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


def _next_of(items: Sequence[Module], *, is_numbered: bool) -> list[Module]:
    """The first of each name, and of dense layers all if their numbers mean nothing."""
    ordered = sorted(items, key=lambda item: item.stem)
    firsts = [next(group) for _, group in itertools.groupby(ordered, key=lambda item: item.stem[0])]
    return firsts if is_numbered else [item for item in ordered if item in firsts or item.rank > 1]


def _outputs(item: Module, before: Neurons | None) -> Iterator[Neurons]:
    """What a module gives out, if it can be given these neurons."""
    matrix = item.matrix
    if matrix is not None and not item.children:
        _, rows, columns = sizes_of(matrix)
        fits = before is None or rows == before.size
        if before is not None and not fits:
            # Of one channel there is nothing to tell its positions from any other numbers by.
            is_flattened = matrix.role == "dense" and before.is_image and before.size > 1 and rows % before.size == 0
            is_depthwise = matrix.role == "conv" and rows == 1 and columns == before.size
            fits = is_flattened or is_depthwise
        if before is not None and matrix.role == "conv" and len(matrix.shape) > 3:
            fits = fits and before.is_image
        if fits:
            yield Neurons(item.label, columns, is_image=matrix.role == "conv")
        return
    children = [child for child in item.children.values() if not child.is_norm]
    if item.has_attention:
        # A transformer's block gives out as many neurons as it is given.
        if before is not None:
            yield dataclasses.replace(before, name=item.label)
        return
    if item.is_called(names.RESIDUAL_BLOCK):
        children = [child for child in children if not child.is_called(names.SHORTCUT)]
    for order in itertools.islice(_orders(children, before, is_numbered=True), 1):
        after = before
        for child in order:
            after = next(_outputs(child, after))
        if after is not None:
            yield dataclasses.replace(after, name=item.label)


def _first_misfit(items: Sequence[Module], before: Neurons | None) -> Module:
    """The module at which the longest order ends."""
    longest: list[Module] = []

    def extend(order: list[Module], rest: Sequence[Module], before: Neurons | None) -> None:
        nonlocal longest
        if len(order) > len(longest):
            longest = order
        for item in _next_of(rest, is_numbered=True):
            for after in itertools.islice(_outputs(item, before), 1):
                extend([*order, item], [other for other in rest if other is not item], after)

    extend([], items, before)
    rest = [item for item in items if item not in longest] or items
    return min(rest, key=lambda item: (item.rank, item.stem))


def sizes_of(tensor: Tensor) -> tuple[int, int, int]:
    return layout_of(tensor.names, tensor.shape, tensor.role).sizes(tensor.shape)


def refuse(tensor: Tensor, reason: str, remedy: str = _REMEDY) -> NoReturn:
    raise ValueError(
        f"NiNo cannot tell how the model is connected at the leaf {tensor.path!r} of shape {tensor.shape}: {reason}. "
        f"{remedy}"
    )
