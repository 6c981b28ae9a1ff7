"""The nowcaster NiNo, and the description of the graph that it works on."""

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
from wnn_jax._window import LeafHistory, check_length, short_repr
from wnn_jax.nowcasters._leaves import (
    CONTEXT,
    check_chunk_size,
    check_horizon,
    check_network,
    default_chunk_size,
    known_horizon,
)
from wnn_jax.nowcasters._multi_horizon import NUM_HORIZONS
from wnn_jax.nowcasters.nino._builders import build_description
from wnn_jax.nowcasters.nino._description import Description, build_graph, check_description
from wnn_jax.nowcasters.nino._graph import MAX_WINDOW, NUM_KINDS, NUM_POSITIONS, Graph, Tensor
from wnn_jax.nowcasters.nino._messages import Messages
from wnn_jax.nowcasters.nino._tensor_edges import edges_of_no_tensor, edges_of_tensors, join_cuts


def neural_graph(params: Any, roles: Any = None, *, num_heads: int | None = None) -> dict[str, Any]:
    """Describe how a model is connected, from the names and shapes of its parameters.

    Three kinds of models are known, with the names that users of Flax linen, Flax nnx and Equinox give their modules:

    - a chain of convolutions (`Conv_0`, `conv1`, `ConvNorm_0`) and dense layers (`Dense_0`, `linear1`, `fc`, `layers`,
      `head`), with or without normalisation layers behind all layers of one size;
    - a residual network: such a chain, with blocks called `ResNetBlock_0`, `BasicBlock_0` and so on between the
      convolutions and the dense layers. A projection in a block is called `conv_proj`, `shortcut` or `downsample`;
    - a transformer like GPT-2: a table of tokens, a table of positions (`wpe`, `pos_embedding`) or none, then blocks of
      attention and two dense layers, each behind a normalisation layer or none. Attention has `query`, `key`, `value`
      and `out`, or `query_proj` and so on, or the first three in one `c_attn` or `qkv`.

    Any other model is refused: describe it yourself. Names do not tell of a residual connection in a chain of layers of
    one width, or of a layer that is used twice.

    Args:
      params: the parameters.
      roles: a tree like them with a role name at each leaf. Default: `wnn_jax.default_roles`.
      num_heads: heads of attention. Needed if its kernels are matrices, as in Equinox and GPT-2; else of no effect.

    Returns:
      A description, made of what JSON has, to look at, to change, and to give to `NiNo`:

      - `"edges"`: for the path of each leaf, the names of its neurons: two for a matrix or a convolution, where its
        edges begin and where they end; one for a vector.
      - `"parts"`: the names of the tensors in a leaf, such as queries, keys and values. They share its outputs in equal
        parts. `"edges"` and `"kinds"` then name them, as `"attn/qkv/kernel:query"`.
      - `"residual"`: pairs of names, from and to. Each neuron is connected with the one in the same place.
      - `"heads"`: the number of heads of attention that neurons belong to.
      - `"kinds"`: the kind of a leaf's edges if it is not its role: `"query"`, `"key"` (whose edges lead back from the
        queries), `"value"` or `"position"`.
      - `"positions"`: 8 numbers that tell the place of each node; never read from parameters. Default: eigenvectors of
        the graph's Laplacian. Nodes are numbered as `"edges"` names their neurons. Before the neurons of one name come
        a node for each of their vectors, and one for each head.

    Raises:
      ValueError: if the model is of no known kind; the message names a leaf and the reason.

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
    if num_heads is not None:
        check_int("num_heads", num_heads, "how many heads attention has", minimum=1)
    tensors, paths = tensors_of(params, default_roles(params) if roles is None else roles)
    return build_description(tensors, paths, num_heads)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NiNo:
    """The neuron interaction and nowcasting network: a graph network that forecasts all weights of a model together.

    It forecasts up to 40 snapshots ahead, from the last 5. A neuron is a node, and a weight (or a window of a
    convolution) is an edge between two nodes. An edge knows its history, at mean 0 and standard deviation 1 in each
    tensor. A node knows its place in the graph. Nodes and edges exchange messages twice, then every edge forecasts.

    `wnn_jax.convert.nino` reads the published weights. The graph is read from the parameters, see `neural_graph`. A
    jump works on chunks of weights: it needs memory for the forecast, and a few hundred numbers for each neuron and for
    each edge of one chunk. Every device gathers all parameters at a jump if they are sharded.

    The published network has a third round of messages, which reaches no forecast and is left out. An edge holds up to
    9 elements, 3 x 3. A larger window is cut into several edges; the published code refuses it.

    Attributes:
      params: the parameters of its network.
      graph: how the model is connected, of the form that `neural_graph` returns, or `None` to read it.
      default_horizon: how many snapshots ahead it forecasts if `horizon` is `None`.
      chunk_size: edges that are worked on at a time, some KiB of memory each. `None`: 8192 on CPU, 131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, `graph` is no description, or `default_horizon` is out of range;
        when it forecasts, or `nowcast` is initialised, if the graph cannot be read or is of another model.

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """

    params: Mapping[str, Any]
    graph: Description | None = None
    default_horizon: int = 5
    chunk_size: int | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    # Without annotations, these are no fields.
    context = CONTEXT
    takes_horizon = True
    roles = ROLES

    def __post_init__(self) -> None:
        def draw(key: jax.Array) -> Any:
            width, num_rounds = jnp.shape(self.params["position"]["kernel"])[1], len(self.params["rounds"])
            return _init(key, width, max(num_rounds, 1))

        check_network("params", self.params, "NiNo", draw)
        if self.graph is not None:
            check_description(self.graph)
            # A copy that nobody changes, because the graph is built from it once.
            graph = copy.deepcopy(dict(self.graph))
            if "positions" in graph:  # An array could not be saved.
                graph["positions"] = np.asarray(graph["positions"], np.float32).tolist()
            object.__setattr__(self, "graph", graph)
        horizon = check_horizon("default_horizon", self.default_horizon, NUM_HORIZONS)
        object.__setattr__(self, "default_horizon", horizon)
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))

    def __repr__(self) -> str:
        return short_repr(self, self.params)

    @classmethod
    def init(cls, key: jax.Array, *, width: int = 128, num_rounds: int = 2) -> Self:
        """Make a random network of a width, the features of nodes and edges, and a number of rounds of messages."""
        return cls(_init(key, width, num_rounds))

    def check_params(self, params: Any, roles: Any) -> None:
        """Raise a `ValueError` if there is no graph of such parameters; else keep the graph for the forecasts."""
        self._graph_of(params, roles)

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecast a tree of parameters; see `Nowcaster`. A horizon that is an array is clipped to 1, ..., 40."""
        check_length(history, CONTEXT)
        chosen = known_horizon(horizon, self.default_horizon, NUM_HORIZONS) - 1
        graph = self._graph_of(history[-1], roles)
        if not graph.blocks:
            return history[-1]
        structure = jax.tree.structure(roles)
        snapshots = [structure.flatten_up_to(snapshot) for snapshot in history]
        whole: list[LeafHistory] = [tuple(map(_gather, leaf)) for leaf in zip(*snapshots, strict=True)]
        # The barrier keeps the compiler from computing all that follows from constant weights and the graph alone.
        params = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, dict(self.params)))
        output = {name: jnp.take(array, chosen, axis=-2) for name, array in params["output"].items()}
        in_tensors = list(edges_of_tensors(graph, whole, self.chunk_size or default_chunk_size()))
        alone = edges_of_no_tensor(graph)
        sources = [(1, lambda _: alone), *((edges.num_chunks, edges.edges) for edges in in_tensors)]
        degrees = jnp.asarray(graph.degrees, jnp.float32)
        messages = Messages(params, jnp.asarray(graph.positions), degrees, sources)
        forecasts = {cut: matrix for edges in in_tensors for cut, matrix in edges.forecast(messages, output)}
        forecast = map(_like, join_cuts(graph, forecasts, [leaf[-1] for leaf in whole]), snapshots[-1])
        return jax.tree.unflatten(structure, forecast)

    def _graph_of(self, params: Any, roles: Any) -> Graph:
        return _graph(*tensors_of(params, roles), None if self.graph is None else self)


@functools.lru_cache(maxsize=16)
def _graph(tensors: tuple[Tensor, ...], paths: tuple[tuple[str, ...], ...], given: NiNo | None) -> Graph:
    """Return the graph that a nowcaster was given, or read it. A model always gets the same object."""
    description = None if given is None else given.graph
    return build_graph(build_description(tensors, paths) if description is None else description, tensors)


def _gather(leaf: Any) -> jax.Array:
    """Gather an array on every device, if mesh axes are explicit. Over automatic axes the compiler does it."""
    leaf = jnp.asarray(leaf)
    is_sharded = any(axis is not None for axis in jax.typeof(leaf).sharding.spec)
    return jax.sharding.reshard(leaf, PartitionSpec()) if is_sharded else leaf


def _like(new: Any, leaf: Any) -> jax.Array:
    """Return an array with the sharding and the dtype of another."""
    new, spec = new.astype(leaf.dtype), jax.typeof(leaf).sharding.spec
    return jax.sharding.reshard(new, spec) if any(axis is not None for axis in spec) else new


def tensors_of(params: Any, roles: Any) -> tuple[tuple[Tensor, ...], tuple[tuple[str, ...], ...]]:
    """Return the tensors of a model, and the names along their paths, without classes and Haiku's `~`."""
    tensors: list[Tensor] = []
    paths: list[tuple[str, ...]] = []
    for (path, leaf), role in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(roles), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        tensors.append(Tensor(name, names_along(params, path), tuple(jnp.shape(leaf)), role))
        paths.append(tuple(name for name in names_along(params, path, with_classes=False) if name != "~"))
        if jnp.ndim(leaf) < 2 and role not in ("bias", "norm"):
            raise ValueError(
                f"NiNo has no edges for the leaf {name!r} of shape {jnp.shape(leaf)} as {role!r}, which has two axes "
                "or more: give it the role 'bias' or 'norm'."
            )
    return tuple(tensors), tuple(paths)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _init(key: jax.Array, width: int, num_rounds: int) -> dict[str, Any]:
    def dense(inputs: int, *outputs: int, scale: float = 1.0) -> dict[str, jax.Array]:
        nonlocal key
        key, own = jax.random.split(key)
        # The published code has 0.02 here, with which the first hundreds of steps change next to nothing.
        return {"kernel": scale * inputs**-0.5 * jax.random.normal(own, [inputs, *outputs]), "bias": jnp.zeros(outputs)}

    return {
        "kind": {"embedding": dense(NUM_KINDS, width)["kernel"]},
        "position": dense(NUM_POSITIONS, width),
        "weights": dense(MAX_WINDOW * CONTEXT, width),
        "rounds": {
            str(level): {
                "modulation": dense(width, 2 * width),
                "message": dense(2 * width, width),
                "node": dense(2 * width, width),
                "mix": dense(width, width),
                "edge": {name: dense(width, width) for name in ("edge", "source", "target", "output")},
            }
            for level in range(num_rounds)
        },
        "hidden": dense(width, width),
        # So that training starts near the last value.
        "output": dense(width, NUM_HORIZONS, MAX_WINDOW, scale=0.01),
    }
