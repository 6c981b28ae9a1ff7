"""The edges of the tensors of a model, a chunk of weights at a time, and their forecasts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._chunks import Chunk, Chunks, chunks_of, for_each_chunk
from wnn_jax.nowcasters._leaves import CONTEXT, finite_or_last
from wnn_jax.nowcasters._scale import Scale, scales_of, standardize
from wnn_jax.nowcasters.nino._graph import KINDS, Ends, Graph
from wnn_jax.nowcasters.nino._messages import Edges, Layer, Messages, dense


class Cut(NamedTuple):
    """The number of a tensor, and the elements of its windows that one edge holds."""

    tensor: int
    start: int
    stop: int


class TensorEdges:
    """The edges of tensors of one dtype, with windows cut to one size, in chunks that hold these cuts in turn."""

    def __init__(self, graph: Graph, scales: Scale, stream: Chunks, cuts: list[Cut]) -> None:
        self._blocks = [graph.blocks[cut.tensor] for cut in cuts]
        self._scales, self._stream, self._cuts = scales, stream, cuts
        self.num_chunks = stream.num_chunks

    def edges(self, index: Any) -> Edges:
        """Return the edges of a chunk."""
        return self._read(self._stream.read(index))[0]

    def forecast(self, messages: Messages, output: Layer) -> Iterable[tuple[Cut, jax.Array]]:
        """Forecast each cut, `[window, rows * columns]`, with the output layer of one horizon."""
        window, sizes = self._cuts[0].stop - self._cuts[0].start, self._stream.sizes

        def write(index: Any, out: jax.Array) -> jax.Array:
            chunk = self._stream.read(index)
            edges, values, scale = self._read(chunk)
            change = dense(messages.last_hidden(edges), output)[:, :window]
            new = (values[..., -1] + change.astype(values.dtype)) * scale.std[..., 0] + scale.mean[..., 0]
            forecast = finite_or_last(new.T, chunk.history)
            return jax.lax.dynamic_update_slice_in_dim(out, forecast, chunk.start, axis=1)

        out = for_each_chunk(self.num_chunks, write, jnp.zeros([window, sum(sizes)], self._stream.dtype))
        return zip(self._cuts, jnp.split(out, np.cumsum(sizes)[:-1], axis=1), strict=True)

    def _read(self, chunk: Chunk) -> tuple[Edges, jax.Array, Scale]:
        """Return the edges of a chunk, their normalised values `[n, window, 5]`, and the scale of each edge."""
        number = chunk.history[0].shape[-1]
        before = np.concatenate([[0], np.cumsum(self._stream.sizes)[:-1]]).astype(np.int32)
        leaf = jnp.broadcast_to(chunk.leaf, (number,))

        def of_edges(of_leaves: Any) -> jax.Array:
            return jnp.asarray(np.array(of_leaves))[leaf]

        ends = Ends(*map(of_edges, zip(*(block.ends for block in self._blocks), strict=True)))
        sources, targets = ends.at(chunk.start + jnp.arange(number) - of_edges(before))
        history = jnp.stack([snapshot.T for snapshot in chunk.history], axis=-1)
        wide = history.astype(wide_dtype(history))
        chosen = of_edges([cut.tensor for cut in self._cuts])
        scale = Scale(*(value.astype(wide.dtype)[chosen][:, None, None] for value in self._scales))
        values = standardize(wide, scale)
        features = values.astype(jnp.float32).reshape(number, -1)
        kinds = of_edges([block.kind for block in self._blocks])
        return Edges(sources, targets, kinds, features, chunk.is_new), values, scale


def edges_of_tensors(graph: Graph, whole: Sequence[LeafHistory], chunk_size: int) -> Iterator[TensorEdges]:
    """Yield the edges of all tensors, from 5 snapshots of each leaf."""
    numbers = np.array([block.piece.leaf for block in graph.blocks])
    scales = Scale(*(of_leaves[numbers] for of_leaves in _scales(whole, chunk_size)))
    parts: dict[Cut, LeafHistory] = {}
    for index, (piece, _, _) in enumerate(graph.blocks):
        if math.prod(piece.tensor.shape):
            matrices = [piece.tensor.to_matrix(piece.of(snapshot)) for snapshot in whole[piece.leaf]]
            for elements in piece.tensor.cuts:
                cut = Cut(index, elements.start, elements.stop)
                parts[cut] = tuple(matrix[elements] for matrix in matrices)
    cuts = list(parts)
    for stream, indices in chunks_of(list(parts.values()), chunk_size):
        yield TensorEdges(graph, scales, stream, [cuts[index] for index in indices])


def join_cuts(graph: Graph, forecasts: Mapping[Cut, jax.Array], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Put the forecasts of cuts into their leaves."""
    joined = list(leaves)
    matrices: dict[int, list[jax.Array]] = {}
    for cut in sorted(forecasts):
        matrices.setdefault(cut.tensor, []).append(forecasts[cut])
    for index, cuts in matrices.items():
        piece = graph.blocks[index].piece
        joined[piece.leaf] = piece.put(joined[piece.leaf], piece.tensor.from_matrix(jnp.concatenate(cuts)))
    return joined


def edges_of_no_tensor(graph: Graph) -> Edges:
    """Return the edges without a tensor. Their features are 2 for loops, 1 for residual connections and heads."""
    features = np.where(graph.kinds == KINDS["self"], 2.0, 1.0).astype(np.float32)
    features = np.broadcast_to(features[:, None], (len(graph.kinds), CONTEXT))
    is_new = np.ones(len(graph.kinds), bool)
    return Edges(*map(jnp.asarray, (graph.sources, graph.targets, graph.kinds, features, is_new)))


def _scales(leaves: Sequence[LeafHistory], chunk_size: int) -> Scale:
    """Return the mean and the standard deviation of the history of every leaf."""
    scales = Scale(*jnp.zeros([2, len(leaves)]))
    flat = [tuple(snapshot.reshape(-1) for snapshot in leaf) for leaf in leaves]
    for stream, indices in chunks_of(flat, chunk_size):

        def write(old: jax.Array, new: jax.Array, indices: list[int] = indices) -> jax.Array:
            return old.astype(jnp.promote_types(old.dtype, new.dtype)).at[np.array(indices)].set(new)

        scales = jax.tree.map(write, scales, scales_of(stream, CONTEXT))
    return scales
