"""The edges of the tensors of a model, a chunk of weights at a time, and what is forecast of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._chunks import Chunk, Chunks, chunks_of
from wnn_jax.nowcasters._leaves import CONTEXT, finite_or_last
from wnn_jax.nowcasters._scale import Scale, scales_of, standardize
from wnn_jax.nowcasters.nino._graph import KINDS, Ends, Graph
from wnn_jax.nowcasters.nino._messages import Edges, Layer, Messages, dense, for_each_chunk


class Weights(NamedTuple):
    """The weights of a chunk of edges: normalised `[n, window, 5]`, as 5 arrays `[n, window]`, and their scale."""

    values: jax.Array
    history: LeafHistory
    scale: Scale


class Cut(NamedTuple):
    """The number of a tensor, and the elements of its windows that one edge holds."""

    tensor: int
    elements: slice


class TensorEdges:
    """The edges of tensors of one dtype, with windows cut to one size, in chunks.

    Args:
      graph: the graph of the model.
      scales: the scales of all its tensors.
      stream: the chunks.
      chosen: the cuts that the stream holds, in its order.
      dtype: the dtype of these tensors.
    """

    def __init__(self, graph: Graph, scales: Scale, stream: Chunks, chosen: list[Cut], dtype: Any) -> None:
        self._blocks = [graph.blocks[cut.tensor] for cut in chosen]
        self._scales = scales
        self._stream = stream
        self._chosen = chosen
        self._dtype = dtype
        self.num_chunks = stream.num_chunks

    def edges(self, index: Any) -> Edges:
        """See `EdgeSource.edges`."""
        return self._read(self._stream.read(index))[0]

    def forecast(self, messages: Messages, output: Layer) -> list[tuple[Cut, jax.Array]]:
        """Forecast each cut, `[window, rows * columns]`, with the output layer of one horizon."""

        def write(index: Any, out: jax.Array) -> jax.Array:
            chunk = self._stream.read(index)
            edges, weights = self._read(chunk)
            change = dense(messages.last_hidden(edges), output)[:, :window]
            values = weights.values[..., -1] + change.astype(weights.values.dtype)
            forecast = finite_or_last(values * weights.scale.std + weights.scale.mean, weights.history)
            return jax.lax.dynamic_update_slice_in_dim(out, forecast.T, chunk.start, axis=1)

        window, sizes = self._chosen[0].elements, self._stream.sizes
        window = window.stop - window.start
        out = jnp.zeros([window, sum(sizes)], self._dtype)
        out = for_each_chunk(self.num_chunks, write, out)
        return list(zip(self._chosen, jnp.split(out, np.cumsum(sizes)[:-1], axis=1), strict=True))

    def _read(self, chunk: Chunk) -> tuple[Edges, Weights]:
        number = chunk.history[0].shape[-1]
        before = np.concatenate([[0], np.cumsum(self._stream.sizes)[:-1]]).astype(np.int32)
        leaf = jnp.broadcast_to(chunk.leaf, (number,))

        def of_edges(of_leaves: Any) -> jax.Array:
            return jnp.asarray(np.array(of_leaves))[leaf]

        ends = Ends(*map(of_edges, zip(*(block.ends for block in self._blocks), strict=True)))
        sources, targets = ends.at(chunk.start + jnp.arange(number) - of_edges(before))
        history = jnp.stack([snapshot.T for snapshot in chunk.history], axis=-1)
        wide = history.astype(wide_dtype(history))
        chosen = of_edges([cut.tensor for cut in self._chosen])
        mean, std = (value.astype(wide.dtype)[chosen][:, None] for value in self._scales)
        values = standardize(wide, Scale(mean[..., None], std[..., None]))
        features = values.astype(jnp.float32).reshape(number, -1)
        weights = Weights(values, tuple(jnp.unstack(history, axis=-1)), Scale(mean, std))
        kinds = of_edges([block.kind for block in self._blocks])
        return Edges(sources, targets, kinds, features, chunk.is_new), weights


def edges_of_tensors(graph: Graph, whole: Sequence[LeafHistory], chunk_size: int) -> Iterator[TensorEdges]:
    """Yield the edges of all tensors, from 5 snapshots of each leaf."""
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
    for (_, dtype), group in alike.items():
        for stream, positions in chunks_of([flat for _, flat in group], chunk_size):
            yield TensorEdges(graph, scales, stream, [group[position][0] for position in positions], dtype)


def join_cuts(graph: Graph, forecasts: Sequence[tuple[Cut, jax.Array]], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Put the forecasts of cuts into their leaves."""
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
    """Return the edges without a tensor. Their features are 2 for loops, 1 for residual connections and heads."""
    features = np.where(graph.kinds == KINDS["self"], 2.0, 1.0).astype(np.float32)
    features = np.broadcast_to(features[:, None], (len(graph.kinds), CONTEXT))
    is_new = np.ones(len(graph.kinds), bool)
    return Edges(*map(jnp.asarray, (graph.sources, graph.targets, graph.kinds, features, is_new)))


def _scales(leaves: Sequence[LeafHistory], chunk_size: int) -> Scale:
    """Mean and standard deviation of every leaf's history."""
    means, stds = jnp.zeros([2, len(leaves)])
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf[0].size:
            alike.setdefault(leaf[0].dtype, []).append(index)
    for indices in alike.values():
        flat = [tuple(snapshot.reshape(-1) for snapshot in leaves[index]) for index in indices]
        for stream, positions in chunks_of(flat, chunk_size):
            mean, std = scales_of(stream, CONTEXT)
            order = np.array([indices[position] for position in positions])
            dtype = jnp.promote_types(means.dtype, mean.dtype)
            means, stds = means.astype(dtype).at[order].set(mean), stds.astype(dtype).at[order].set(std)
    return Scale(means, stds)
