"""The network of NiNo: messages along the edges of a graph."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax.nowcasters._chunks import for_each_chunk

Layer = Mapping[str, Any]
# On accelerators the default rounds the factors to fewer bits than the published outputs agree in.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Edges(NamedTuple):
    """Edges of a graph: the nodes where they begin and end, and their `KINDS`, arrays `[n]`."""

    sources: Any
    targets: Any
    kinds: Any
    features: Any
    """`[n, up to 45]`, the normalised histories of the elements of a window, one after another."""
    is_new: Any
    """`[n]`, `False` for edges that another chunk has too. These do not count."""


class Messages:
    """The network of a `NiNo` on one graph: nodes and edges exchange messages, a chunk of edges at a time.

    Nothing is kept of an edge between rounds: computing it again is cheaper than storing it. Linear layers are applied
    to the sums of edges, and successive linear layers are merged into one. `sources` holds all edges: numbers of
    chunks, each with a function from the index of a chunk to its edges.

    References:
      Knyazev et al., ICLR 2025, after Kofinas et al., ICLR 2024.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        positions: jax.Array,
        degrees: jax.Array,
        sources: Sequence[tuple[int, Callable[[Any], Edges]]],
    ) -> None:
        self._params, self._sources = params, sources
        self._rounds = [params["rounds"][str(level)] for level in range(len(params["rounds"]))]
        self._ends: list[tuple[jax.Array, jax.Array]] = []
        nodes = dense(positions, params["position"])
        for level, layers in enumerate(self._rounds):
            nodes = jax.nn.silu(self._pass_messages(level, layers, nodes, jnp.maximum(degrees, 1)[:, None]))
            update = layers["edge"]
            self._ends.append((dense(nodes, update["source"]), dense(nodes, update["target"])))

    def last_hidden(self, edges: Edges) -> jax.Array:
        """Return the last hidden layer of some edges, `[n, width]`."""
        level, layer = len(self._rounds), self._params["hidden"]
        return jax.nn.silu(dense(self._hidden(level, edges), self._after_edge(level, layer)))

    def _pass_messages(self, level: int, layers: Layer, nodes: jax.Array, degrees: jax.Array) -> jax.Array:
        """Return the nodes after a round."""
        # A message to node i is s (A v_i + B v_j + b) + t, with s and t linear in the edge. Only the sums of s B v_j
        # and of the edges are computed edge by edge.
        width, kernel = nodes.shape[1], layers["message"]["kernel"]
        of_targets = dense(nodes, {**layers["message"], "kernel": kernel[:width]})
        of_sources = _dot(nodes, kernel[width:])
        gain = {name: array[..., :width] for name, array in layers["modulation"].items()}
        gain_of_edge = self._after_edge(level, gain)

        def add_chunk(edges_of: Callable[[Any], Edges], index: Any, sums: jax.Array) -> jax.Array:
            edges = edges_of(index)
            hidden = self._hidden(level, edges)
            # Before any round an edge is linear in few features.
            message = self._linear_in_features(edges, gain) if level == 0 else dense(hidden, gain_of_edge)
            terms = jnp.concatenate([hidden, message * of_sources[edges.sources]], axis=1)
            return sums.at[edges.targets].add(jnp.where(edges.is_new[:, None], terms, 0))

        sums = jnp.zeros([len(degrees), 2 * width])
        for num_chunks, edges_of in self._sources:
            sums = for_each_chunk(num_chunks, functools.partial(add_chunk, edges_of), sums)
        hidden, of_sources = sums[:, :width] / degrees, sums[:, width:] / degrees
        modulation = dense(hidden, self._after_edge(level, layers["modulation"]))
        mean = of_targets * modulation[:, :width] + of_sources + modulation[:, width:]
        return dense(dense(jnp.concatenate([nodes, mean], axis=1), layers["node"]), layers["mix"])

    def _hidden(self, level: int, edges: Edges) -> jax.Array:
        """Return the edges before any round, or their hidden layer after some rounds."""
        hidden = self._linear_in_features(edges, self._rounds[0]["edge"]["edge"] if level > 0 else None)
        for before, (of_sources, of_targets) in enumerate(self._ends[:level]):
            if before > 0:
                hidden = dense(hidden, self._after_edge(before, self._rounds[before]["edge"]["edge"]))
            hidden = jax.nn.silu(hidden + of_sources[edges.sources] + of_targets[edges.targets])
        return hidden

    def _after_edge(self, level: int, layer: Layer) -> Layer:
        """Merge a linear layer of edges into a layer of what `_hidden` returns."""
        if level == 0:
            return layer
        first = self._rounds[level - 1]["edge"]["output"]
        return {"kernel": _dot(first["kernel"], layer["kernel"]), "bias": dense(first["bias"], layer)}

    def _linear_in_features(self, edges: Edges, layer: Layer | None) -> jax.Array:
        """Return the edges before any round, or a linear layer of these edges."""
        kernel = self._params["weights"]["kernel"][: edges.features.shape[1]]
        by_kind = self._params["kind"]["embedding"] + self._params["weights"]["bias"][None]
        if layer is not None:
            kernel, by_kind = _dot(kernel, layer["kernel"]), dense(by_kind, layer)
        return _dot(edges.features, kernel) + by_kind[edges.kinds]


def dense(inputs: jax.Array, layer: Layer) -> jax.Array:
    """Apply a linear layer to the last axis."""
    outputs = _dot(inputs, layer["kernel"])
    return outputs + layer["bias"].reshape((1,) * (outputs.ndim - layer["bias"].ndim) + layer["bias"].shape)
