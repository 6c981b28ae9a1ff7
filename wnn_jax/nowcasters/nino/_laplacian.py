"""Eigenvectors of the Laplacian of a graph whose nodes come in layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Nodes that follow one another."""

    start: int
    size: int


class Link(NamedTuple):
    """Which nodes are connected: all of one span with all of another, or each with the one in the same place."""

    source: Span
    target: Span
    is_diagonal: bool


def laplacian_eigenvectors(links: Sequence[Link], num_nodes: int, number: int) -> np.ndarray:
    """Return eigenvectors of the undirected graph's normalised Laplacian, of the smallest eigenvalues but the first.

    The neurons of a layer differ only in their residual connections. So there are two kinds of eigenvectors. One is the
    same for all neurons of a layer, and belongs to a small matrix with a row for each layer. The other adds up to zero
    in every layer, and belongs to the residual connections alone. No array is as large as the edges. An eigenvalue with
    many eigenvectors gets a fixed random choice of them. The largest element of an eigenvector is positive.

    Returns:
      `[num_nodes, number]` in float32; columns beyond the number of nodes are 0.
    """
    starts, sizes = _layers(links, num_nodes)
    full, diagonal = _adjacency(links, starts)
    degrees = full @ sizes + diagonal.sum(axis=1)
    inverse = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1)), 0)
    matrices = full * np.sqrt(np.outer(sizes, sizes)) + diagonal, diagonal
    spectra = [np.linalg.eigh(inverse[:, None] * matrix * inverse[None]) for matrix in matrices]
    rng, columns, value = np.random.default_rng(0), np.zeros([num_nodes, 0]), np.inf
    while (missing := min(number + 1, num_nodes) - columns.shape[1]) > 0:
        # The next smaller eigenvalue of the adjacency, and projections on its eigenvectors of both kinds, by layer.
        value = max(other for values, _ in spectra for other in values if other < value - 1e-9)
        chosen = [vectors[:, np.abs(values - value) < 1e-9] for values, vectors in spectra]
        same, apart = (vectors @ vectors.T for vectors in chosen)
        dimension = round(same.trace() + apart.diagonal() @ (sizes - 1))
        drawn = _project(rng.normal(size=[num_nodes, min(dimension, missing)]), starts, sizes, same, apart)
        columns = np.concatenate([columns, np.linalg.qr(drawn)[0]], axis=1)
    columns = columns[:, 1:]
    columns = columns * np.sign([column[np.abs(column) > 0.999 * np.abs(column).max()][0] for column in columns.T])
    return np.pad(columns, ((0, 0), (0, number - columns.shape[1]))).astype(np.float32)


def _project(
    vectors: np.ndarray, starts: np.ndarray, sizes: np.ndarray, same: np.ndarray, apart: np.ndarray
) -> np.ndarray:
    """Project the means of layers, and the differences from these means, by matrices `[layers, layers]`."""
    layer, roots = np.repeat(np.arange(len(sizes)), sizes), np.sqrt(sizes)[:, None]
    sums = np.add.reduceat(vectors, starts)
    projected = (same @ (sums / roots) / roots)[layer]
    for size in np.unique(sizes):  # Only layers of one size have residual connections.
        alike = np.flatnonzero(sizes == size)
        nodes = starts[alike][:, None] + np.arange(size)
        apart_from_means = vectors[nodes] - sums[alike][:, None] / size
        projected[nodes] += np.tensordot(apart[np.ix_(alike, alike)], apart_from_means, axes=1)
    return projected


def _layers(links: Sequence[Link], num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the largest spans start in which no link begins or ends, and their sizes."""
    cuts, before = {0, num_nodes}, set[int]()
    for span in (span for link in links for span in link[:2]):
        cuts |= {span.start, span.start + span.size}
    ends = [link[:2] for link in links if link.is_diagonal]
    while cuts != before:
        before = set(cuts)
        for one, other in (*ends, *(pair[::-1] for pair in ends)):
            cuts |= {other.start + cut - one.start for cut in cuts if one.start <= cut <= one.start + one.size}
    ordered = np.array(sorted(cuts))
    return ordered[:-1], np.diff(ordered)


def _adjacency(links: Sequence[Link], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return between which layers all nodes are connected, and between which each with the one in the same place."""
    full, diagonal = np.zeros([2, len(starts), len(starts)])
    for link in links:
        sources, targets = (np.flatnonzero((starts >= span.start) & (starts < sum(span))) for span in link[:2])
        if link.is_diagonal:
            diagonal[sources, targets] = diagonal[targets, sources] = 1
        else:
            full[np.ix_(sources, targets)] = full[np.ix_(targets, sources)] = 1
    diagonal[full == 1] = 0
    # A node is not connected with itself.
    diagonal[np.diag_indices(len(starts))] = -np.diag(full)
    return full, diagonal
