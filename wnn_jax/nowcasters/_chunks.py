"""Many leaves as one sequence of equal chunks, so that XLA compiles the work on a chunk only once."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._window import LeafHistory

# The forecasts of a sequence of leaves are one array until it is cut into leaves. This bounds its size.
_MAX_WEIGHTS = 2**23


class Chunk(NamedTuple):
    """Some weights, arrays `[n]`: all chunks have one size, so a weight may be in two of them, and new in only one."""

    history: LeafHistory
    """Snapshots, arrays `[..., n]`."""
    leaf: jax.Array
    """The number of the leaf that each weight is in."""
    start: jax.Array
    """The position of the first weight among all weights of the sequence, a scalar."""
    is_new: jax.Array


class Chunks:
    """Flat leaves of one dtype, sorted by size, cut along their last axis.

    Large leaves are read in place. Leaves of less than a chunk are joined into one array first.
    """

    def __init__(self, leaves: Sequence[LeafHistory], chunk_size: int) -> None:
        self._leaves = leaves
        self.sizes = [leaf[0].shape[-1] for leaf in leaves]
        self.dtype = leaves[0][0].dtype
        self._chunk_size = min(chunk_size, sum(self.sizes))
        self._num_small = sum(size < chunk_size for size in self.sizes)
        self._sources = list(leaves[self._num_small :])
        self._lengths = self.sizes[self._num_small :]
        if self._num_small:
            joined = [jnp.concatenate(snapshots, axis=-1) for snapshots in zip(*leaves[: self._num_small], strict=True)]
            length = joined[0].shape[-1]
            padding = [(0, 0)] * (joined[0].ndim - 1) + [(0, max(self._chunk_size - length, 0))]
            self._sources.insert(0, tuple(jnp.pad(snapshot, padding) for snapshot in joined))
            self._lengths.insert(0, length)
        self._num_chunks = [-(-length // self._chunk_size) for length in self._lengths]
        self.num_chunks = sum(self._num_chunks)

    def zeros(self) -> jax.Array:
        """Make an array for one number of every weight, of the dtype and mesh of the leaves."""
        return jnp.broadcast_to(jnp.zeros_like(self._sources[0][0].reshape(-1)[0]), (sum(self.sizes),))

    def counts(self) -> jax.Array:
        """Return the number of weights in every leaf, `[leaves]`."""
        return _array(self.sizes)

    def read(self, index: Any) -> Chunk:
        """Read the chunk of this number. Write results in the order of chunks: padding reaches into the next leaf."""
        ends = _array(itertools.accumulate(self._num_chunks))
        source = jnp.sum(index >= ends)
        length = _array(self._lengths)[source]
        begin = (index - (ends - _array(self._num_chunks))[source]) * self._chunk_size
        start = jnp.maximum(jnp.minimum(begin, length - self._chunk_size), 0)
        history = jax.lax.switch(source, [functools.partial(self._slice, arrays) for arrays in self._sources], start)
        within = start + jnp.arange(self._chunk_size)
        before = (_array(itertools.accumulate(self._lengths)) - _array(self._lengths))[source]
        leaf = jnp.searchsorted(_array(itertools.accumulate(self.sizes)), before + within, side="right")
        return Chunk(history, leaf, before + start, (within >= begin) & (within < length))

    def firsts(self) -> jax.Array:
        """Return the first weight of every leaf, `[leaves]`."""
        return jnp.concatenate([leaf[0][:1] for leaf in self._leaves])

    def fold(self, function: Callable[..., jax.Array], numbers: Sequence[jax.Array], *, largest: bool) -> jax.Array:
        """Sum a function over the snapshots and weights of every leaf, or find its maximum: `[leaves]`.

        The function is given a snapshot and the numbers of its leaf, from arrays `[leaves]`. It is elementwise, and not
        negative if its maximum is wanted.
        """
        combine, reduce = (jnp.maximum, jnp.max) if largest else (jnp.add, jnp.sum)

        def values(history: Sequence[jax.Array], chosen: Any) -> jax.Array:
            given = [number[chosen][:, None] for number in numbers]
            return functools.reduce(combine, (function(snapshot, *given) for snapshot in history))

        def add_chunk(index: Any, totals: jax.Array) -> jax.Array:
            chunk = self.read(index)
            leaf = chunk.leaf[:1]
            new = jnp.where(chunk.is_new[None], values([snapshot[None] for snapshot in chunk.history], leaf), 0)
            return totals.at[leaf].set(combine(totals[leaf], reduce(new, axis=1)))

        totals = [reduce(values(rows, chosen), axis=1) for chosen, rows in self._small_leaves()]
        start = jnp.concatenate([*totals, jnp.zeros_like(numbers[0][self._num_small :])])
        if self._num_small == len(self.sizes):
            return start
        return jax.lax.fori_loop(self._num_chunks[0] if self._num_small else 0, self.num_chunks, add_chunk, start)

    def _small_leaves(self) -> Iterator[tuple[slice, list[jax.Array]]]:
        """Yield the small leaves of one size at once: snapshots `[leaves, weights]`."""
        start = first = 0
        for size, alike in itertools.groupby(self.sizes[: self._num_small]):
            number = len(list(alike))
            stop = start + number * size
            rows = [snapshot[start:stop].reshape(number, size) for snapshot in self._sources[0]]
            yield slice(first, first + number), rows
            start, first = stop, first + number

    def _slice(self, arrays: LeafHistory, start: jax.Array) -> LeafHistory:
        return tuple(jax.lax.dynamic_slice_in_dim(array, start, self._chunk_size, axis=-1) for array in arrays)


def chunks_of(
    leaves: Sequence[LeafHistory], chunk_size: int, apart: Sequence[Any] | None = None
) -> Iterator[tuple[Chunks, list[int]]]:
    """Put the leaves that are not empty into sequences of chunks.

    Leaves are arrays `[n]` or `[k, n]`. Another dtype, `k` or item of `apart` begins another sequence.

    Yields:
      The chunks of some leaves, and the indices of these leaves, in their order.
    """
    groups: dict[Any, list[int]] = {}
    for index, (first, *_) in enumerate(leaves):
        if first.size:
            groups.setdefault((first.dtype, first.shape[:-1], apart and apart[index]), []).append(index)
    for indices in groups.values():
        part: list[int] = []
        total = 0
        for index in sorted(indices, key=lambda index: leaves[index][0].shape[-1]):
            size = leaves[index][0].shape[-1]
            if part and total + size > _MAX_WEIGHTS:
                yield Chunks([leaves[index] for index in part], chunk_size), part
                part, total = [], 0
            part.append(index)
            total += size
        yield Chunks([leaves[index] for index in part], chunk_size), part


def for_each_chunk(num_chunks: int, fn: Callable[[Any, jax.Array], jax.Array], value: jax.Array) -> jax.Array:
    """Apply `fn(index, value)` to one chunk after the other."""
    return fn(0, value) if num_chunks == 1 else jax.lax.fori_loop(0, num_chunks, fn, value)


def _array(numbers: Any) -> jax.Array:
    """Make an array of ints. It is not constant, because `custom_partitioning` does not take constants."""
    return jnp.stack([jnp.full([], number, jnp.int32) for number in numbers])
