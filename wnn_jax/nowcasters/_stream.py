"""Many leaves as one sequence of chunks of one size: what is done to a chunk is compiled once for all of them."""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._moments import Moments, largest_of, moments_from_sums, sum_terms, units_of

# The forecast of the leaves of a stream is one array until it is cut into leaves, and this bounds its size.
_MAX_WEIGHTS = 2**23


class Chunk(NamedTuple):
    """Some weights of a stream.

    Attributes:
      history: snapshots, arrays `[..., n]`.
      leaf: which leaf they are of: a scalar, or `[n]`.
      start: where they are among all weights of the stream.
      is_new: `[n]`, `False` for those that the chunk before had as well. The last chunk of a leaf begins early enough
        to be as long as all others.
    """

    history: LeafHistory
    leaf: jax.Array
    start: jax.Array
    is_new: jax.Array


class Stream(Protocol):
    """Flat leaves of one dtype, in chunks along their last axis."""

    num_chunks: int
    sizes: list[int]

    def zeros(self) -> jax.Array:
        """An array for all weights of the stream, of their dtype and mesh."""
        ...

    def read(self, index: Any) -> Chunk:
        """The chunk of this number."""
        ...

    def moments(self, mesh_axes: tuple[str, ...]) -> Moments:
        """The moments of all leaves, of which these may be shards along mesh axes."""
        ...


def streams_of(leaves: Sequence[LeafHistory], chunk_size: int) -> Iterator[tuple[Stream, list[int]]]:
    """Puts leaves into streams.

    Args:
      leaves: flat and not empty, of one dtype: arrays `[n]`, or `[k, n]` of one `k`, which have no moments.
      chunk_size: the largest number of weights in a chunk, or of the `k` that belong together.

    Yields:
      A stream, and the indices of its leaves, in its order.
    """
    for kind, in_kind in ((SmallLeaves, operator.lt), (LargeLeaves, operator.ge)):
        chosen = [index for index, leaf in enumerate(leaves) if in_kind(leaf[0].shape[-1], chunk_size)]
        chosen.sort(key=lambda index: leaves[index][0].shape[-1])
        for indices in _pack(chosen, [leaves[index][0].shape[-1] for index in chosen]):
            yield kind([leaves[index] for index in indices], chunk_size), indices


def _pack(indices: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Cuts a list into parts that are not too large together."""
    part: list[int] = []
    total = 0
    for index, size in zip(indices, sizes, strict=True):
        if part and total + size > _MAX_WEIGHTS:
            yield part
            part, total = [], 0
        part.append(index)
        total += size
    if part:
        yield part


class LargeLeaves:
    """Leaves of at least a chunk. They are read where they are."""

    def __init__(self, leaves: list[LeafHistory], chunk_size: int) -> None:
        self._leaves = leaves
        self._chunk_size = chunk_size
        self.sizes = [leaf[0].shape[-1] for leaf in leaves]
        self._chunks = [-(-size // chunk_size) for size in self.sizes]
        self.num_chunks = sum(self._chunks)

    def zeros(self) -> jax.Array:
        """See `Stream.zeros`."""
        return _zeros(self._leaves[0][0], sum(self.sizes))

    def read(self, index: Any) -> Chunk:
        """See `Stream.read`."""
        ends = _stack(itertools.accumulate(self._chunks))
        leaf = jnp.sum(index >= ends)
        size = _stack(self.sizes)[leaf]
        begin = (index - (ends - _stack(self._chunks))[leaf]) * self._chunk_size
        start = jnp.minimum(begin, size - self._chunk_size)

        branches = [functools.partial(_slices, leaf, size=self._chunk_size) for leaf in self._leaves]
        history = jax.lax.switch(leaf, branches, start)
        before = (_stack(itertools.accumulate(self.sizes)) - _stack(self.sizes))[leaf]
        return Chunk(history, leaf, before + start, start + jnp.arange(self._chunk_size) >= begin)

    def moments(self, mesh_axes: tuple[str, ...]) -> Moments:
        """See `Stream.moments`."""
        anchors = _anchors(jnp.stack([leaf[0][0] for leaf in self._leaves]), mesh_axes)

        def find_largest(index: Any, largest: jax.Array) -> jax.Array:
            chunk = self.read(index)
            return largest.at[chunk.leaf].max(largest_of([snapshot[None] for snapshot in chunk.history])[0])

        largest = jnp.zeros(len(self._leaves), self._leaves[0][0].dtype)
        largest = jax.lax.fori_loop(0, self.num_chunks, find_largest, largest)
        units = _units(largest, mesh_axes)

        def add_chunk(index: Any, sums: jax.Array) -> jax.Array:
            chunk = self.read(index)
            history = [snapshot[None] for snapshot in chunk.history]
            of_chunk = sum_terms(history, anchors[chunk.leaf][None], units[chunk.leaf][None], chunk.is_new)
            return sums.at[:, chunk.leaf].add(of_chunk[:, 0])

        sums = jnp.zeros([_num_sums(self._leaves), len(self._leaves)], anchors.dtype)
        sums = jax.lax.fori_loop(0, self.num_chunks, add_chunk, sums)
        return _moments(sums, anchors, units, self.sizes, mesh_axes)


class SmallLeaves:
    """Leaves of less than a chunk, put together. Those of one size must follow one another."""

    def __init__(self, leaves: list[LeafHistory], chunk_size: int) -> None:
        self._leaves = leaves
        self.sizes = [leaf[0].shape[-1] for leaf in leaves]
        self._history = tuple(jnp.concatenate(snapshots, axis=-1) for snapshots in zip(*leaves, strict=True))
        self._chunk_size = min(chunk_size, sum(self.sizes))
        self.num_chunks = -(-sum(self.sizes) // self._chunk_size)

    def zeros(self) -> jax.Array:
        """See `Stream.zeros`."""
        return _zeros(self._leaves[0][0], sum(self.sizes))

    def read(self, index: Any) -> Chunk:
        """See `Stream.read`."""
        begin = index * self._chunk_size
        start = jnp.minimum(begin, sum(self.sizes) - self._chunk_size)
        history = _slices(self._history, start, self._chunk_size)
        position = start + jnp.arange(self._chunk_size)
        leaf = jnp.searchsorted(_stack(itertools.accumulate(self.sizes)), position, side="right")
        return Chunk(history, leaf, start, position >= begin)

    def moments(self, mesh_axes: tuple[str, ...]) -> Moments:
        """See `Stream.moments`."""
        ends = _stack(itertools.accumulate(self.sizes))
        anchors = _anchors(self._history[0][ends - _stack(self.sizes)], mesh_axes)
        alike = list(self._alike())
        units = _units(jnp.concatenate([largest_of(history) for _, history in alike]), mesh_axes)
        sums = [sum_terms(history, anchors[chosen], units[chosen]) for chosen, history in alike]
        return _moments(jnp.concatenate(sums, axis=1), anchors, units, self.sizes, mesh_axes)

    def _alike(self) -> Iterator[tuple[slice, list[jax.Array]]]:
        """The leaves of one size, which are worked on at once: models have many small leaves, of few sizes."""
        start = first = 0
        for size, alike in itertools.groupby(self.sizes):
            number = len(list(alike))
            end, last = start + size * number, first + number
            yield slice(first, last), [snapshot[start:end].reshape(number, size) for snapshot in self._history]
            start, first = end, last


def _slices(snapshots: LeafHistory, start: jax.Array, size: int) -> LeafHistory:
    return tuple(jax.lax.dynamic_slice_in_dim(snapshot, start, size, axis=-1) for snapshot in snapshots)


def _anchors(first: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Those of leaves, given the first weight of each."""
    anchors = first.astype(wide_dtype(first))
    # Of all devices the same, and no sum of these, which could overflow.
    return jax.lax.pmax(anchors, mesh_axes) if mesh_axes else anchors


def _units(largest: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    return units_of(jax.lax.pmax(largest, mesh_axes) if mesh_axes else largest)


def _moments(
    sums: jax.Array, anchors: jax.Array, units: jax.Array, sizes: list[int], mesh_axes: tuple[str, ...]
) -> Moments:
    counts = _stack(sizes).astype(jnp.float32)
    if mesh_axes:
        sums, counts = jax.lax.psum((sums, counts), mesh_axes)
    return moments_from_sums(sums, anchors, units, counts)


def _num_sums(leaves: Sequence[LeafHistory]) -> int:
    history = [jax.ShapeDtypeStruct((1, 1), jnp.float32)] * len(leaves[0])
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(sum_terms, history, one, one).shape[0]


def _zeros(like: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(jnp.zeros_like(like[0]), (size,))


def _stack(numbers: Any) -> jax.Array:
    """An array of ints. Not a constant one, which `custom_partitioning` does not take."""
    return jnp.stack([jnp.full([], number, jnp.int32) for number in numbers])
