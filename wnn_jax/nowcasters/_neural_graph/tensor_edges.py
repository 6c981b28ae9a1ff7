"""The edges of the tensors of a model, a chunk of weights at a time, and what is forecast of them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._leaves import finite_or_last
from wnn_jax.nowcasters._multi_horizon import CONTEXT, Scale, normalize, scale_of
from wnn_jax.nowcasters._neural_graph.graph import KINDS, Ends, Graph
from wnn_jax.nowcasters._neural_graph.messages import Edges, Layer, Messages, dense, for_each_chunk
from wnn_jax.nowcasters._stream import Chunk, Stream, streams_of


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


class Cut(NamedTuple):
    """What one edge has of the window between two neurons, for all of a tensor.

    Attributes:
      tensor: the number of the tensor.
      elements: of its windows.
    """

    tensor: int
    elements: slice


class TensorEdges:
    """The edges of tensors, cut to windows of one size, of one dtype, in chunks.

    Args:
      graph: of the model.
      leaves: all its tensors, 5 snapshots of each.
      scales: of all of them, that of its leaf for a part of one.
      stream: the chunks of those that are meant.
      chosen: their cuts, in the order of the stream.
      window: how many elements these have.
    """

    def __init__(
        self, graph: Graph, leaves: Sequence[LeafHistory], scales: Scale, stream: Stream, chosen: list[Cut], window: int
    ) -> None:
        self._graph = graph
        self._leaves = leaves
        self._scales = scales
        self._stream = stream
        self._chosen = chosen
        self._window = window
        self.num_chunks = stream.num_chunks

    def edges(self, index: Any) -> Edges:
        """See `EdgeSource.edges`."""
        return self._read(self._stream.read(index))[0]

    def forecast(self, messages: Messages, output: Layer) -> list[tuple[Cut, jax.Array]]:
        """The forecasts of the cuts, `[window, rows * columns]` each, from a linear layer of one horizon."""

        def write(index: Any, out: jax.Array) -> jax.Array:
            chunk = self._stream.read(index)
            edges, weights = self._read(chunk)
            change = dense(messages.last_hidden(edges), output)[:, : self._window]
            values = weights.values[..., -1] + change.astype(weights.values.dtype)
            forecast = finite_or_last(values * weights.scale.std + weights.scale.mean, weights.history)
            return jax.lax.dynamic_update_slice_in_dim(out, forecast.T, chunk.start, axis=1)

        sizes = self._stream.sizes
        out = jnp.zeros([self._window, sum(sizes)], self._leaves[self._chosen[0].tensor][0].dtype)
        out = for_each_chunk(self.num_chunks, write, out)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        return [
            (cut, out[:, start:stop])
            for cut, (start, stop) in zip(self._chosen, itertools.pairwise(starts), strict=True)
        ]

    def _read(self, chunk: Chunk) -> tuple[Edges, Weights]:
        number = chunk.history[0].shape[-1]
        before = np.concatenate([[0], np.cumsum(self._stream.sizes)[:-1]]).astype(np.int32)
        blocks = [self._graph.blocks[cut.tensor] for cut in self._chosen]
        leaf = jnp.broadcast_to(chunk.leaf, (number,))

        def of_edges(of_leaves: Any) -> jax.Array:
            return jnp.asarray(np.array(of_leaves))[leaf]

        ends = Ends(*map(of_edges, zip(*(block.ends for block in blocks), strict=True)))
        sources, targets = ends.at(chunk.start + jnp.arange(number) - of_edges(before))
        history = jnp.stack([snapshot.T for snapshot in chunk.history], axis=-1)
        wide = history.astype(wide_dtype(history))
        chosen = of_edges([cut.tensor for cut in self._chosen])
        mean, std = (value.astype(wide.dtype)[chosen][:, None] for value in self._scales)
        values = normalize(wide, Scale(mean[..., None], std[..., None]))
        features = values.astype(jnp.float32).reshape(number, -1)
        weights = Weights(values, tuple(jnp.unstack(history, axis=-1)), Scale(mean, std))
        return Edges(sources, targets, of_edges([block.kind for block in blocks]), features, chunk.is_new), weights


def edges_of_tensors(graph: Graph, whole: Sequence[LeafHistory], chunk_size: int) -> Iterator[TensorEdges]:
    """The edges of all tensors, from the leaves that these are, or are parts of: 5 snapshots of each."""
    numbers = np.array([piece.leaf for piece in graph.pieces])
    scales = Scale(*(of_leaves[numbers] for of_leaves in _scales(whole, chunk_size)))
    leaves: list[LeafHistory] = [tuple(map(piece.of, whole[piece.leaf])) for piece in graph.pieces]
    alike: dict[Any, list[tuple[Cut, LeafHistory]]] = {}
    for index, (leaf, block) in enumerate(zip(leaves, graph.blocks, strict=True)):
        if leaf[0].size:
            matrices = [block.layout.to_matrix(snapshot) for snapshot in leaf]
            for elements in block.layout.cuts(leaf[0].shape):
                flat = tuple(matrix[elements] for matrix in matrices)
                alike.setdefault((flat[0].shape[0], leaf[0].dtype), []).append((Cut(index, elements), flat))
    for (window, _), group in alike.items():
        for stream, positions in streams_of([flat for _, flat in group], chunk_size):
            yield TensorEdges(graph, leaves, scales, stream, [group[position][0] for position in positions], window)


def join_cuts(graph: Graph, forecasts: Sequence[tuple[Cut, jax.Array]], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Puts the forecasts of cuts into the leaves that they are of."""
    matrices: dict[int, dict[int, jax.Array]] = {}
    for cut, matrix in forecasts:
        matrices.setdefault(cut.tensor, {})[cut.elements.start] = matrix
    joined = list(leaves)
    for index, cuts in matrices.items():
        piece, layout = graph.pieces[index], graph.blocks[index].layout
        whole = jnp.concatenate([cuts[start] for start in sorted(cuts)])
        leaf = joined[piece.leaf]
        joined[piece.leaf] = piece.put(leaf, layout.from_matrix(whole, piece.of(leaf).shape))
    return joined


def edges_of_no_tensor(graph: Graph) -> Edges:
    """Edges with features of their own: 2 of loops, 1 of residual connections and heads."""
    features = np.where(graph.kinds == KINDS["self"], 2.0, 1.0).astype(np.float32)
    features = np.broadcast_to(features[:, None], (len(graph.kinds), CONTEXT))
    is_new = np.ones(len(graph.kinds), bool)
    return Edges(*map(jnp.asarray, (graph.sources, graph.targets, graph.kinds, features, is_new)))


def _scales(leaves: Sequence[LeafHistory], chunk_size: int) -> Scale:
    """Mean and standard deviation of every tensor's history."""
    scales: list[Scale] = []
    order: list[int] = []
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf[0].size:
            alike.setdefault(leaf[0].dtype, []).append(index)
    for indices in alike.values():
        flat = [tuple(snapshot.reshape(-1) for snapshot in leaves[index]) for index in indices]
        for stream, positions in streams_of(flat, chunk_size):
            scales.append(scale_of(stream.moments(())))
            order += [indices[position] for position in positions]

    def of_leaves(of_streams: list[jax.Array]) -> jax.Array:
        known = jnp.concatenate([jnp.zeros([0]), *of_streams])
        return jnp.zeros(len(leaves), known.dtype).at[np.array(order, int)].set(known)

    return Scale(of_leaves([scale.mean for scale in scales]), of_leaves([scale.std for scale in scales]))
