"""NiNo: a network that passes messages along the weights of a model, over its neural graph."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from wnn_jax._history import wide_dtype
from wnn_jax._horizon import clip_horizon
from wnn_jax._nowcaster import LeafHistory, summarize_nowcaster
from wnn_jax._roles import ROLES, default_roles, names_along
from wnn_jax.nowcasters._graph import (
    KINDS,
    MAX_WINDOW,
    NUM_KINDS,
    NUM_POSITIONS,
    Description,
    Ends,
    Graph,
    Tensor,
    build_graph,
    check_description,
)
from wnn_jax.nowcasters._graph_reader import read_graph
from wnn_jax.nowcasters._leaves import check_chunk_size, default_chunk_size, finite_or_last
from wnn_jax.nowcasters._multi_horizon import CONTEXT, NUM_HORIZONS, Scale, check_horizon, scale_of
from wnn_jax.nowcasters._stream import Chunk, Stream, streams_of

_Layer = Mapping[str, Any]
# `_dot(one, other)`: on accelerators the default rounds the factors to fewer bits than the published outputs agree in.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def neural_graph(params: Any, roles: Any = None) -> dict[str, Any]:
    """Reads from the names and the shapes of parameters how a model is connected.

    What is read are chains of convolutions and dense layers with their biases and normalisation layers, where order and
    sizes leave one possibility; attention whose parts are called query, key, value and out, or query_proj and so on, in
    transformers whose blocks have two dense layers after it; and residual blocks that are called so. Names are
    understood as Flax linen, Flax nnx, Haiku and Equinox give them. All else is refused. What no name and no size tells
    is not seen: a residual connection in a chain of layers of one width, or that a layer is used twice.

    Args:
      params: the parameters.
      roles: a tree like them with a role name at each leaf. Default: `wnn_jax.default_roles`.

    Returns:
      A description, of what JSON has, to look at, to change, and to give to `NiNo`:

      - `"edges"`: for each leaf, by its path, the names of the neurons that it connects: of a matrix or a convolution
        where its edges begin and where they end, of a vector where they end.
      - `"residual"`: pairs of names, from and to, of as many neurons, each of which is connected with the one in the
        same place.
      - `"heads"`: how many heads of attention neurons belong to.
      - `"kinds"`: of leaves whose edges are not of the kind of their role: `"query"`, `"key"` (whose edges lead back
        from the queries), `"value"` or `"position"`.
      - `"positions"`, which is never read: 8 numbers for each node that tell its place. Without them these are
        eigenvectors of the graph's Laplacian. Nodes are numbered as `"edges"` names their neurons; before these come
        a node for each of their vectors, and one for each head.

    Raises:
      ValueError: if the model cannot be read, naming a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import wnn_jax
      >>> params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)},
      ...           "Dense_0": {"kernel": jnp.zeros((8, 10))}}
      >>> wnn_jax.nowcasters.neural_graph(params)["edges"]
      {'Conv_0/kernel': ['input', 'conv_0'], 'Conv_0/bias': ['conv_0'], 'Dense_0/kernel': ['conv_0', 'dense_0']}

    References:
      Knyazev et al., ICLR 2025, section 4 and its appendix on neural graphs.
    """
    roles = default_roles(params) if roles is None else roles
    tensors = _tensors_of(params, roles)
    paths = [names_along(params, path, with_classes=False) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return read_graph(tensors, [tuple(name for name in names if name != "~") for names in paths])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NiNo:
    """The neuron interaction and nowcasting network.

    A graph network that forecasts all weights of a model together, from their last 5 snapshots, any number of
    snapshots up to 40 ahead. A neuron is a node, and a weight (or a window of a convolution) an edge between two. Each
    edge is told its history, brought to mean 0 and standard deviation 1 by tensor, and each node its place in the
    graph; then nodes and edges tell each other what they know, twice, and every edge forecasts.

    The graph is read from the names and the shapes of the parameters; see `neural_graph` for what can be read. It is
    looked for when `nowcast` is initialised: what cannot be read is an error then. Weights are worked on in chunks; at
    a jump there are, beside the forecast, a few hundred numbers for each neuron and for each edge of one chunk. Where
    parameters are sharded every device gathers all of them at a jump, for messages go everywhere.

    The published network has a third round of messages, which reaches no forecast; it is left out.

    Attributes:
      params: the parameters of its network.
      graph: how the model is connected, of the form that `neural_graph` returns, or `None` to read it.
      default_horizon: how many snapshots ahead it forecasts where `horizon` is `None`.
      chunk_size: how many edges are worked on at a time; at most 6 KiB of working memory for each. `None`: 8192 on CPU,
        131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, `graph` is no description, or `default_horizon` is not one that it
        forecasts; when it forecasts, or `nowcast` is initialised, if the graph cannot be read or is of another model.

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """

    params: Mapping[str, Any]
    graph: Description | None = None
    default_horizon: int = 5
    chunk_size: int | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    # Not annotated, and so no fields.
    context = CONTEXT
    takes_horizon = True
    roles = ROLES

    def __post_init__(self) -> None:
        try:
            width, num_rounds = jnp.shape(self.params["position"]["kernel"])[1], len(self.params["rounds"])
            expected = jax.tree.map(jnp.shape, _init_shapes(width, num_rounds)) if num_rounds else None
        except (KeyError, TypeError, IndexError):
            expected = None
        if expected is None or jax.tree.map(jnp.shape, dict(self.params)) != expected:
            raise ValueError(
                f"params are not the parameters of a NiNo: they have the shapes "
                f"{jax.tree.map(jnp.shape, dict(self.params))} where {expected or 'others'} are expected."
            )
        if self.graph is not None:
            check_description(self.graph)
        object.__setattr__(
            self, "default_horizon", check_horizon("default_horizon", self.default_horizon, NUM_HORIZONS)
        )
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))

    def __repr__(self) -> str:
        return summarize_nowcaster(self, self.params)

    @classmethod
    def init(cls, key: jax.Array, *, width: int = 128, num_rounds: int = 2) -> Self:
        """A randomly initialised network, to be trained.

        Args:
          key: a `jax.random` key.
          width: features of nodes and edges.
          num_rounds: how often messages are passed.
        """
        return cls(_init(key, width, num_rounds))

    def check_params(self, params: Any, roles: Any) -> None:
        """Raises a `ValueError` if there is no graph of such parameters; otherwise it is kept for the forecasts."""
        _ = self._graph_of(params, roles).positions

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecasts a tree of parameters.

        Args:
          history: 5 parameter trees, oldest first.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: how many snapshots ahead, from 1 to 40, or `None` for `default_horizon`. A traced one is brought
            into that range.

        Returns:
          The forecast, a tree like the parameters.

        Raises:
          ValueError: if `horizon` is out of range or no int, `history` does not have 5 trees, or there is no graph of
            such parameters.
        """
        if len(history) != CONTEXT:
            raise ValueError(
                f"history has {len(history)} snapshots but this nowcaster has context={CONTEXT}; "
                f"pass a sequence of {CONTEXT} parameter trees, oldest first."
            )
        horizon = self.default_horizon if horizon is None else horizon
        if not isinstance(horizon, jax.Array):
            horizon = check_horizon("horizon", horizon, NUM_HORIZONS)
        graph = self._graph_of(history[-1], roles)
        if not graph.blocks:
            return history[-1]
        structure = jax.tree.structure(roles)
        snapshots = [structure.flatten_up_to(snapshot) for snapshot in history]
        leaves: list[LeafHistory] = [tuple(map(_whole, leaf)) for leaf in zip(*snapshots, strict=True)]
        params = jax.tree.map(jnp.asarray, dict(self.params))
        chosen = clip_horizon(horizon, NUM_HORIZONS) - 1
        output = {name: jnp.take(array, chosen, axis=-2) for name, array in params["output"].items()}
        sweep = Sweep(graph, leaves, params, self.chunk_size)
        forecast = sweep.map_weights(functools.partial(_forecast, output=output))
        forecast = [_like(new, leaf) for new, leaf in zip(forecast, snapshots[-1], strict=True)]
        return jax.tree.unflatten(structure, forecast)

    def _graph_of(self, params: Any, roles: Any) -> Graph:
        tensors = _tensors_of(params, roles)
        if self.graph is None:
            return _graph_as_read(
                tensors,
                tuple(
                    tuple(name for name in names_along(params, path, with_classes=False) if name != "~")
                    for path, _ in jax.tree_util.tree_leaves_with_path(params)
                ),
            )
        return _graph_as_given(tensors, _Given(self.graph))


class Weights(NamedTuple):
    """The weights of a chunk of edges.

    Attributes:
      values: `[n, window, 5]`, in units of their tensors' standard deviations from the means.
      history: 5 arrays `[n, window]`, oldest first, as they are.
      scale: of their tensors, `[n, 1]` each.
    """

    values: jax.Array
    history: LeafHistory
    scale: Scale


def _forecast(weights: Weights, hidden: jax.Array, output: _Layer) -> jax.Array:
    """The forecast at one horizon: `[n, window]`."""
    window = weights.history[0].shape[-1]
    change = _dense(hidden, output)[:, :window]
    wide = weights.history[-1].dtype
    values = weights.values[..., -1] + change.astype(wide)
    return finite_or_last(values * weights.scale.std + weights.scale.mean, weights.history)


class _Edges(NamedTuple):
    """A chunk of edges: where they begin and end, what they are, their features, and which of them are new."""

    sources: jax.Array
    targets: jax.Array
    kinds: jax.Array
    features: jax.Array
    is_new: jax.Array


class _Part(NamedTuple):
    """Tensors with windows of one size and of one dtype, in chunks: which leaves they are, and their edges."""

    stream: Stream
    leaves: list[int]
    window: int


class Sweep:
    """The network on one model: passes over all edges, a chunk at a time.

    Nothing is kept of an edge between passes. It is cheaper to make it again than to store it: what is linear in it is
    applied to the sums of edges, and linear layers that follow one another are one.

    Args:
      graph: of the model.
      leaves: its tensors, 5 snapshots of each.
      params: of the network.
      chunk_size: the largest number of edges in a chunk.
    """

    def __init__(self, graph: Graph, leaves: Sequence[LeafHistory], params: Any, chunk_size: int | None) -> None:
        self._graph = graph
        self._leaves = leaves
        self._params = params
        size = chunk_size or default_chunk_size()
        self._scales = _scales(leaves, size)
        self._parts = list(self._make_parts(size))
        degrees = jnp.maximum(jnp.asarray(graph.degrees, jnp.float32), 1)[:, None]
        nodes = _dense(jnp.asarray(graph.positions), params["position"])
        self._ends: list[tuple[jax.Array, jax.Array]] = []
        self._rounds = [params["rounds"][str(level)] for level in range(len(params["rounds"]))]
        for level, layers in enumerate(self._rounds):
            nodes = jax.nn.silu(self._pass_messages(level, layers, nodes, degrees))
            update = layers["edge"]
            self._ends.append((_dense(nodes, update["source"]), _dense(nodes, update["target"])))

    def map_weights(self, fn: Callable[[Weights, jax.Array], jax.Array]) -> list[jax.Array]:
        """Applies a function to the weights of every edge, and what the network knows of it.

        Args:
          fn: `(weights, hidden [n, width]) -> [n, window, ...]`.

        Returns:
          For every leaf an array of its shape, with what else `fn` returns in the axes after.
        """
        mapped: dict[int, jax.Array] = {}
        for part in self._parts:

            def make(index: Any, part: _Part = part) -> tuple[jax.Array, jax.Array]:
                chunk = part.stream.read(index)
                edges, weights = self._read(part, chunk)
                return chunk.start, jnp.moveaxis(fn(weights, self._last(edges)), 1, 0)

            def write(index: Any, out: jax.Array, make: Any = make) -> jax.Array:
                start, made = make(index)
                return jax.lax.dynamic_update_slice_in_dim(out, made, start, axis=1)

            _, made = jax.eval_shape(make, 0)
            out = jnp.zeros([part.window, sum(part.stream.sizes), *made.shape[2:]], made.dtype)
            out = _for_each_chunk(part.stream, write, out)
            start = 0
            for leaf, size in zip(part.leaves, part.stream.sizes, strict=True):
                layout, shape = self._graph.blocks[leaf].layout, self._leaves[leaf][0].shape
                matrix = out[:, start : start + size]
                rest = matrix.shape[2:]
                flat = [layout.from_matrix(x, shape) for x in jnp.moveaxis(matrix.reshape(*matrix.shape[:2], -1), 2, 0)]
                mapped[leaf] = jnp.stack(flat, axis=-1).reshape(*shape, *rest) if rest else flat[0]
                start += size
        return [mapped.get(leaf, history[-1]) for leaf, history in enumerate(self._leaves)]

    def _make_parts(self, chunk_size: int) -> Any:
        alike: dict[Any, list[int]] = {}
        for index, (leaf, block) in enumerate(zip(self._leaves, self._graph.blocks, strict=True)):
            if leaf[0].size:
                alike.setdefault((block.layout.sizes(leaf[0].shape)[0], leaf[0].dtype), []).append(index)
        for (window, _), indices in alike.items():
            # Snapshots of the first element of the windows, then those of the second, and so on.
            flat = [self._elements(index, window) for index in indices]
            for stream, positions in streams_of(flat, chunk_size):
                yield _Part(stream, [indices[position] for position in positions], window)

    def _elements(self, index: int, window: int) -> LeafHistory:
        layout = self._graph.blocks[index].layout
        matrices = [layout.to_matrix(snapshot) for snapshot in self._leaves[index]]
        return tuple(matrix[element] for element in range(window) for matrix in matrices)

    def _read(self, part: _Part, chunk: Chunk) -> tuple[_Edges, Weights]:
        number = chunk.history[0].shape[0]
        before = np.concatenate([[0], np.cumsum(part.stream.sizes)[:-1]]).astype(np.int32)
        blocks = [self._graph.blocks[leaf] for leaf in part.leaves]
        leaf = jnp.broadcast_to(chunk.leaf, (number,))

        def of_edges(of_leaves: Any) -> jax.Array:
            return jnp.asarray(np.array(of_leaves))[leaf]

        ends = Ends(*map(of_edges, zip(*(block.ends for block in blocks), strict=True)))
        sources, targets = ends.at(chunk.start + jnp.arange(number) - of_edges(before))
        chosen = of_edges(part.leaves)
        history = jnp.stack(chunk.history, axis=-1).reshape(number, part.window, CONTEXT)
        wide = history.astype(wide_dtype(history))
        mean, std = (value.astype(wide.dtype)[chosen][:, None] for value in self._scales)
        # The constant is that of the published code.
        values = (wide - mean[..., None]) / (std[..., None] + 1e-6)
        features = values.astype(jnp.float32).reshape(number, -1)
        weights = Weights(values, tuple(jnp.unstack(history, axis=-1)), Scale(mean, std))
        return _Edges(sources, targets, of_edges([block.kind for block in blocks]), features, chunk.is_new), weights

    def _of_no_tensor(self) -> _Edges:
        """Edges with features of their own: 2 of loops, 1 of all others."""
        graph = self._graph
        kinds = jnp.asarray(graph.kinds)
        features = jnp.broadcast_to(jnp.where(kinds == KINDS["self"], 2.0, 1.0)[:, None], (len(graph.kinds), CONTEXT))
        ends = (jnp.asarray(graph.sources), jnp.asarray(graph.targets))
        return _Edges(*ends, kinds, features, jnp.ones(len(graph.kinds), bool))

    def _pass_messages(self, level: int, layers: _Layer, nodes: jax.Array, degrees: jax.Array) -> jax.Array:
        r"""The nodes after a round.

        A message along an edge is :math:`s \odot (A v_i + B v_j + b) + t`, with :math:`s` and :math:`t` linear in the
        edge. Of its mean over the edges to node :math:`i` only :math:`\sum s \odot B v_j` and the sum of the edges need
        to be made edge by edge.
        """
        width = nodes.shape[1]
        kernel = layers["message"]["kernel"]
        of_targets = _dense(nodes, {**layers["message"], "kernel": kernel[:width]})
        of_sources = _dot(nodes, kernel[width:])
        gain = {name: array[..., :width] for name, array in layers["modulation"].items()}
        gain_of_edge = self._after_edge(level, gain)

        def add(edges: _Edges, sums: jax.Array) -> jax.Array:
            hidden = self._hidden(level, edges)
            # Before any round linear in few features, rather than in what was made of them.
            message = self._linear_in_features(edges, gain) if level == 0 else _dense(hidden, gain_of_edge)
            terms = jnp.concatenate([hidden, message * of_sources[edges.sources]], axis=1)
            return sums.at[edges.targets].add(jnp.where(edges.is_new[:, None], terms, 0))

        sums = add(self._of_no_tensor(), jnp.zeros([len(degrees), 2 * width]))
        for part in self._parts:

            def add_chunk(index: Any, sums: jax.Array, part: _Part = part) -> jax.Array:
                return add(self._read(part, part.stream.read(index))[0], sums)

            sums = _for_each_chunk(part.stream, add_chunk, sums)
        hidden, of_sources = sums[:, :width] / degrees, sums[:, width:] / degrees
        modulation = _dense(hidden, self._after_edge(level, layers["modulation"]))
        mean = of_targets * modulation[:, :width] + of_sources + modulation[:, width:]
        return _dense(_dense(jnp.concatenate([nodes, mean], axis=1), layers["node"]), layers["mix"])

    def _hidden(self, level: int, edges: _Edges) -> jax.Array:
        """What an edge is made of after some rounds: the edge itself before them, its hidden layer after them."""
        if level == 0:
            return self._linear_in_features(edges, None)
        hidden = None
        for before in range(level):
            update = self._rounds[before]["edge"]["edge"]
            if hidden is None:
                linear = self._linear_in_features(edges, update)
            else:
                linear = _dense(hidden, self._after_edge(before, update))
            of_sources, of_targets = self._ends[before]
            hidden = jax.nn.silu(linear + of_sources[edges.sources] + of_targets[edges.targets])
        assert hidden is not None
        return hidden

    def _last(self, edges: _Edges) -> jax.Array:
        """The hidden layer of the forecast, `[n, width]`."""
        level = len(self._rounds)
        return jax.nn.silu(_dense(self._hidden(level, edges), self._after_edge(level, self._params["hidden"])))

    def _after_edge(self, level: int, layer: _Layer) -> _Layer:
        """A linear layer of edges, as one of what they are made of."""
        if level == 0:
            return layer
        return _compose(self._rounds[level - 1]["edge"]["output"], layer)

    def _linear_in_features(self, edges: _Edges, layer: _Layer | None) -> jax.Array:
        """The edges as they are before any round, or a linear layer of these."""
        first = {**self._params["weights"], "kind": self._params["kind"]["embedding"]}
        kernel = first["kernel"][: edges.features.shape[1]]
        by_kind = first["kind"] + first["bias"][None]
        if layer is not None:
            kernel, by_kind = _dot(kernel, layer["kernel"]), _dense(by_kind, layer)
        return _dot(edges.features, kernel) + by_kind[edges.kinds]


def _for_each_chunk(stream: Stream, fn: Callable[[Any, jax.Array], jax.Array], value: jax.Array) -> jax.Array:
    return fn(0, value) if stream.num_chunks == 1 else jax.lax.fori_loop(0, stream.num_chunks, fn, value)


def _dense(inputs: jax.Array, layer: _Layer) -> jax.Array:
    outputs = _dot(inputs, layer["kernel"])
    return outputs + layer["bias"].reshape((1,) * (outputs.ndim - layer["bias"].ndim) + layer["bias"].shape)


def _compose(first: _Layer, second: _Layer) -> _Layer:
    """Two linear layers as one."""
    return {"kernel": _dot(first["kernel"], second["kernel"]), "bias": _dense(first["bias"], second)}


def _scales(leaves: Sequence[LeafHistory], chunk_size: int) -> Scale:
    """Mean and standard deviation of every tensor's history."""
    mean, std = ([jnp.zeros([])] * len(leaves) for _ in range(2))
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf[0].size:
            alike.setdefault(leaf[0].dtype, []).append(index)
    for indices in alike.values():
        flat = [tuple(snapshot.reshape(-1) for snapshot in leaves[index]) for index in indices]
        for stream, positions in streams_of(flat, chunk_size):
            scale = scale_of(stream.moments(()))
            for number, position in enumerate(positions):
                mean[indices[position]], std[indices[position]] = scale.mean[number], scale.std[number]
    return Scale(jnp.stack(mean), jnp.stack(std))


def _whole(leaf: Any) -> jax.Array:
    """An array that is on every device, where mesh axes are explicit. Over automatic ones the compiler sees to it."""
    leaf = jnp.asarray(leaf)
    if any(axis is not None for axis in jax.typeof(leaf).sharding.spec):
        return jax.sharding.reshard(leaf, PartitionSpec())
    return leaf


def _like(new: jax.Array, leaf: Any) -> jax.Array:
    """An array of the sharding and the dtype of another."""
    new = new.astype(leaf.dtype)
    spec = jax.typeof(leaf).sharding.spec
    return jax.sharding.reshard(new, spec) if any(axis is not None for axis in spec) else new


def _tensors_of(params: Any, roles: Any) -> tuple[Tensor, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(
        Tensor(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            names_along(params, path),
            tuple(jnp.shape(leaf)),
            role,
        )
        for (path, leaf), role in zip(leaves, jax.tree.leaves(roles), strict=True)
    )


@functools.lru_cache(maxsize=16)
def _graph_as_read(tensors: tuple[Tensor, ...], paths: tuple[tuple[str, ...], ...]) -> Graph:
    return build_graph(read_graph(tensors, paths), tensors)


@dataclasses.dataclass(frozen=True)
class _Given:
    """A description by identity, so that it can be a key."""

    description: Description

    def __hash__(self) -> int:
        return id(self.description)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Given) and other.description is self.description


@functools.lru_cache(maxsize=16)
def _graph_as_given(tensors: tuple[Tensor, ...], given: _Given) -> Graph:
    return build_graph(given.description, tensors)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _init(key: jax.Array, width: int, num_rounds: int) -> dict[str, Any]:
    def dense(inputs: int, *outputs: int) -> dict[str, jax.Array]:
        nonlocal key
        key, own = jax.random.split(key)
        # As published.
        return {"kernel": 0.02 * jax.random.normal(own, [inputs, *outputs]), "bias": jnp.zeros(outputs)}

    def embed(number: int) -> dict[str, jax.Array]:
        return {"embedding": dense(number, width)["kernel"]}

    def one_round() -> dict[str, Any]:
        return {
            "modulation": dense(width, 2 * width),
            "message": dense(2 * width, width),
            "node": dense(2 * width, width),
            "mix": dense(width, width),
            "edge": {name: dense(width, width) for name in ("edge", "source", "target", "output")},
        }

    return {
        "kind": embed(NUM_KINDS),
        "position": dense(NUM_POSITIONS, width),
        "weights": dense(MAX_WINDOW * CONTEXT, width),
        "rounds": {str(level): one_round() for level in range(num_rounds)},
        "hidden": dense(width, width),
        "output": dense(width, NUM_HORIZONS, MAX_WINDOW),
    }


def _init_shapes(width: int, num_rounds: int) -> Any:
    return jax.eval_shape(lambda key: _init(key, width, num_rounds), jax.random.key(0))
