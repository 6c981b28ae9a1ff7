"""NiNo: a network that passes messages along the weights of a model, over its neural graph."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from wnn_jax._checks import check_int
from wnn_jax._roles import ROLES, default_roles, names_along
from wnn_jax._window import LeafHistory, check_length, summarize_nowcaster
from wnn_jax.nowcasters._leaves import check_chunk_size, default_chunk_size
from wnn_jax.nowcasters._multi_horizon import CONTEXT, NUM_HORIZONS, check_horizon, known_horizon
from wnn_jax.nowcasters._neural_graph.building import Description, build_graph, check_description
from wnn_jax.nowcasters._neural_graph.graph import MAX_WINDOW, NUM_KINDS, NUM_POSITIONS, Graph, Tensor
from wnn_jax.nowcasters._neural_graph.messages import Messages, WholeEdges
from wnn_jax.nowcasters._neural_graph.reading import read_graph
from wnn_jax.nowcasters._neural_graph.tensor_edges import edges_of_no_tensor, edges_of_tensors, join_cuts


def neural_graph(params: Any, roles: Any = None, *, num_heads: int | None = None) -> dict[str, Any]:
    """Reads from the names and the shapes of parameters how a model is connected.

    What is read are chains of convolutions and dense layers with their biases and normalisation layers, where order and
    sizes leave one possibility; attention whose parts are called query, key, value and out, or query_proj and so on, or
    lie in this order in one layer called c_attn or qkv, in transformers whose blocks have two dense layers after it;
    and residual blocks that are called so. Names are understood as Flax linen, Flax nnx, Haiku and Equinox give them.
    All else is refused, and so is what may be connected in another way, such as a projection in a residual block,
    convolutions after dense layers, or networks side by side. What no name and no size tells is not seen: a residual
    connection in a chain of layers of one width, or that a layer is used twice. Normalisation layers are taken to come
    before attention and the dense layers after it, at the end of a transformer unless their name says otherwise, before
    the layers of blocks that are called preactivated, and else behind the layers of their size; tables of embeddings to
    be added up.

    Args:
      params: the parameters.
      roles: a tree like them with a role name at each leaf. Default: `wnn_jax.default_roles`.
      num_heads: how many heads attention has. Where its kernels are matrices, as those of Equinox and of GPT-2 are, no
        shape tells it; elsewhere it is of no effect.

    Returns:
      A description, of what JSON has, to look at, to change, and to give to `NiNo`:

      - `"edges"`: for each leaf, by its path, the names of the neurons that it connects: of a matrix or a convolution
        where its edges begin and where they end, of a vector where they end.
      - `"parts"`: of leaves that are several tensors in one, such as queries, keys and values, the names of these. They
        share its outputs in equal parts, in that order. In `"edges"` and `"kinds"` they stand in for the leaf, as
        `"attn/c_attn/kernel:query"`.
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
    if num_heads is not None:
        check_int("num_heads", num_heads, "how many heads attention has", minimum=1)
    return read_graph(_tensors_of(params, roles), _paths_of(params), num_heads)


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

    The published network has a third round of messages, which reaches no forecast; it is left out. An edge has the
    histories of up to 9 elements, 3 x 3. A larger window, as of the first layer of a ResNet or the patches of a vision
    transformer, is cut into edges between the same neurons, of 9 elements each and what remains. That is ours: the
    published network has not seen such a window, and its code does not take one.

    Attributes:
      params: the parameters of its network.
      graph: how the model is connected, of the form that `neural_graph` returns, or `None` to read it.
      default_horizon: how many snapshots ahead it forecasts where `horizon` is `None`.
      chunk_size: how many edges are worked on at a time; some KiB of working memory for each. `None`: 8192 on CPU,
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
            # A copy, which nobody changes: the graph that is built of it is kept.
            graph = copy.deepcopy(dict(self.graph))
            if "positions" in graph:  # An array could not be saved.
                graph["positions"] = np.asarray(graph["positions"], np.float32).tolist()
            object.__setattr__(self, "graph", graph)
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
        check_length(history, CONTEXT)
        chosen = known_horizon(horizon, self.default_horizon, NUM_HORIZONS) - 1
        graph = self._graph_of(history[-1], roles)
        if not graph.blocks:
            return history[-1]
        structure = jax.tree.structure(roles)
        snapshots = [structure.flatten_up_to(snapshot) for snapshot in history]
        whole: list[LeafHistory] = [tuple(map(_whole, leaf)) for leaf in zip(*snapshots, strict=True)]
        # As constants, all that follows from them and from the graph alone would be computed while it is compiled.
        params = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, dict(self.params)))
        output = {name: jnp.take(array, chosen, axis=-2) for name, array in params["output"].items()}
        of_tensors = list(edges_of_tensors(graph, whole, self.chunk_size or default_chunk_size()))
        others = WholeEdges(edges_of_no_tensor(graph))
        degrees = jnp.asarray(graph.degrees, jnp.float32)
        messages = Messages(params, jnp.asarray(graph.positions), degrees, [others, *of_tensors])
        forecasts = [made for edges in of_tensors for made in edges.forecast(messages, output)]
        forecast = map(_like, join_cuts(graph, forecasts, [leaf[-1] for leaf in whole]), snapshots[-1])
        return jax.tree.unflatten(structure, forecast)

    def _graph_of(self, params: Any, roles: Any) -> Graph:
        tensors = _tensors_of(params, roles)
        if self.graph is None:
            return read_tensors(tensors, _paths_of(params))
        return _graph_as_given(tensors, _Given(self.graph))


def _whole(leaf: Any) -> jax.Array:
    """An array that is on every device, where mesh axes are explicit. Over automatic ones the compiler sees to it."""
    leaf = jnp.asarray(leaf)
    if any(axis is not None for axis in jax.typeof(leaf).sharding.spec):
        return jax.sharding.reshard(leaf, PartitionSpec())
    return leaf


def _like(new: Any, leaf: Any) -> jax.Array:
    """An array of the sharding and the dtype of another."""
    new = new.astype(leaf.dtype)
    spec = jax.typeof(leaf).sharding.spec
    return jax.sharding.reshard(new, spec) if any(axis is not None for axis in spec) else new


def _tensors_of(params: Any, roles: Any) -> tuple[Tensor, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = tuple(
        Tensor(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            names_along(params, path),
            tuple(jnp.shape(leaf)),
            role,
        )
        for (path, leaf), role in zip(leaves, jax.tree.leaves(roles), strict=True)
    )
    for tensor in tensors:
        if len(tensor.shape) < 2 and tensor.role not in ("bias", "norm"):
            raise ValueError(
                f"NiNo has no edges for the leaf {tensor.path!r} of shape {tensor.shape} as {tensor.role!r}, which has "
                "two axes or more: give it the role 'bias' or 'norm'."
            )
    return tensors


def _paths_of(params: Any) -> tuple[tuple[str, ...], ...]:
    """The names along the paths of all leaves; Haiku's `~` is none."""
    paths = [names_along(params, path, with_classes=False) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(tuple(name for name in names if name != "~") for names in paths)


@functools.lru_cache(maxsize=16)
def read_tensors(tensors: tuple[Tensor, ...], paths: tuple[tuple[str, ...], ...]) -> Graph:
    """The graph of a model, from its tensors and the names along their paths: always the same object."""
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
    def dense(inputs: int, *outputs: int, scale: float = 1.0) -> dict[str, jax.Array]:
        nonlocal key
        key, own = jax.random.split(key)
        # Not the 0.02 of the published code, with which the first hundreds of steps change next to nothing.
        return {"kernel": scale * inputs**-0.5 * jax.random.normal(own, [inputs, *outputs]), "bias": jnp.zeros(outputs)}

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
        # So that training starts near the last value.
        "output": dense(width, NUM_HORIZONS, MAX_WINDOW, scale=0.01),
    }


def _init_shapes(width: int, num_rounds: int) -> Any:
    return jax.eval_shape(lambda key: _init(key, width, num_rounds), jax.random.key(0))
