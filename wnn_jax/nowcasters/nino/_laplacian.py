"""Eigenvectors of the Laplacian of a graph whose nodes come in layers."""

import itertools
import math
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
    in every layer, and belongs to the residual connections alone. No array is as large as the edges. An eigenvalue of
    the second kind has many eigenvectors, and a fixed random choice of them is taken. The largest element of an
    eigenvector is positive.

    Returns:
      `[num_nodes, number]` in float32; columns beyond the number of nodes are 0.
    """
    atoms = _atoms(links, num_nodes)
    sizes = np.array([atom.size for atom in atoms], float)
    full, diagonal = _adjacency(links, atoms)
    degrees = full @ sizes + diagonal.sum(axis=1)
    inverse = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1)), 0)
    alike = inverse[:, None] * (full * np.sqrt(np.outer(sizes, sizes)) + diagonal) * inverse[None]
    apart = inverse[:, None] * diagonal * inverse[None]
    # Eigenvalues of the Laplacian, each with its eigenvector by atom, and whether it is the same in all of an atom.
    values, vectors = np.linalg.eigh(alike)
    spectrum = [(1 - value, vector, True) for value, vector in zip(values, vectors.T, strict=True)]
    for component in _components(diagonal):
        if sizes[component[0]] > 1:
            values, vectors = np.linalg.eigh(apart[np.ix_(component, component)])
            for value, vector in zip(values, vectors.T, strict=True):
                whole = np.zeros(len(atoms))
                whole[component] = vector
                spectrum.append((1 - value, whole, False))
    spectrum.sort(key=lambda entry: entry[0])
    columns = _eigenvectors(spectrum, atoms, num_nodes, number + 1)[:, 1:]
    largest = np.argmax(np.abs(columns) > 0.999 * np.abs(columns).max(axis=0, initial=0), axis=0)
    columns = columns * np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1, 1)
    padding = np.zeros([num_nodes, number - columns.shape[1]])
    return np.concatenate([columns, padding], axis=1).astype(np.float32)


def _eigenvectors(
    spectrum: Sequence[tuple[float, np.ndarray, bool]], atoms: Sequence[Span], num_nodes: int, number: int
) -> np.ndarray:
    """Orthonormal eigenvectors `[num_nodes, up to number]`, from those by atom."""
    rng = np.random.default_rng(0)
    columns: list[np.ndarray] = []
    first = 0
    while first < len(spectrum) and len(columns) < number:
        last = first
        while last < len(spectrum) and spectrum[last][0] - spectrum[first][0] < 1e-9:
            last += 1
        space = spectrum[first:last]
        dimension = sum(1 if same else atoms[int(np.argmax(vector != 0))].size - 1 for _, vector, same in space)
        wanted = min(dimension, number - len(columns))
        drawn = np.zeros([num_nodes, wanted])
        for _, vector, same in space:
            involved = [(span, value) for span, value in zip(atoms, vector, strict=True) if value != 0]
            if same:
                noise = np.ones([1, wanted]) if dimension == 1 else rng.normal(size=[1, wanted])
            else:
                noise = rng.normal(size=[involved[0][0].size, wanted])
                noise -= noise.mean(axis=0)
            for span, value in involved:
                unit = math.sqrt(span.size) if same else 1
                drawn[span.start : span.start + span.size] += value / unit * noise
        columns += list(np.linalg.qr(drawn)[0].T)
        first = last
    return np.stack(columns, axis=1)


def _atoms(links: Sequence[Link], num_nodes: int) -> list[Span]:
    """The nodes in the largest spans such that no link begins or ends within a span."""
    cuts = {0, num_nodes}
    for link in links:
        for span in (link.source, link.target):
            cuts |= {span.start, span.start + span.size}
    diagonal = [link for link in links if link.is_diagonal]
    before = -1
    while len(cuts) != before:
        before = len(cuts)
        for link in diagonal:
            for one, other in ((link.source, link.target), (link.target, link.source)):
                cuts |= {other.start + cut - one.start for cut in cuts if one.start <= cut <= one.start + one.size}
    ordered = sorted(cuts)
    return [Span(start, stop - start) for start, stop in itertools.pairwise(ordered)]


def _adjacency(links: Sequence[Link], atoms: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Between which atoms all nodes are connected, and between which each with the one in the same place."""
    starts = np.array([atom.start for atom in atoms])

    def within(span: Span) -> np.ndarray:
        return np.flatnonzero((starts >= span.start) & (starts < span.start + span.size))

    full, diagonal = np.zeros([2, len(atoms), len(atoms)])
    for link in links:
        sources, targets = within(link.source), within(link.target)
        if link.is_diagonal:
            diagonal[sources, targets] = diagonal[targets, sources] = 1
        else:
            full[np.ix_(sources, targets)] = full[np.ix_(targets, sources)] = 1
    diagonal[full == 1] = 0
    # A node is not connected with itself.
    diagonal[np.diag_indices(len(atoms))] = -np.diag(full)
    return full, diagonal


def _components(adjacency: np.ndarray) -> list[list[int]]:
    """The connected parts of a graph, from its matrix."""
    from scipy.sparse.csgraph import connected_components

    number, labels = connected_components(adjacency, directed=False)
    return [np.flatnonzero(labels == label).tolist() for label in range(number)]
