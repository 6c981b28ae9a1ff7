"""The kinds of history: a window of snapshots, and a drift. Whole trees of the parameters' own shapes and shardings."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._trees import difference, wide_dtype

# Trees like the parameters rather than one stacked tree: sharding metadata made for the parameters is right for each
# of them, and no leaf loses its sharding in a stack.
Window = tuple[Any, ...]
MemoryKind = Literal["pinned_host"] | None


class DriftHistory(NamedTuple):
    """Where the optimizer takes the parameters, in the long run.

    Attributes:
      anchor: the parameters after the latest visit, like the parameters.
      means: running means of how far the optimizer moved them between two visits, each a tree like the parameters, in
        float32 or wider.
    """

    anchor: Any
    means: tuple[Any, ...]


class AveragedWindow(NamedTuple):
    """A window of snapshots of the running mean of the parameters.

    Attributes:
      mean: a tree like the parameters, in float32 or wider.
      window: snapshots of it.
    """

    mean: Any
    window: Window


@dataclasses.dataclass(frozen=True)
class WindowFormat:
    """How the snapshots of a window are kept.

    There is a place for every visit of the window but the last. A visit without a snapshot has `None` there, which
    takes no memory, and so a window is never taken for one of other visits.

    Attributes:
      offsets: the visits with a snapshot, counted from 0; that of the last is not kept.
      dtype: `None`, to keep all of them as the parameters are; or a dtype in which those after the first are kept as
        their differences from it, where that is narrower than the parameter is.
      memory_kind: `None`, to keep them where the parameters are, or the kind of memory to keep them in.
    """

    offsets: tuple[int, ...]
    dtype: Any = None
    memory_kind: MemoryKind = None

    def init(self, params: Any) -> Window:
        """Empty snapshots, each in buffers of its own so that the state can be donated."""

        def empty(param: Any, index: int) -> jax.Array:
            return put_away(jnp.zeros_like(param, dtype=self._dtype(param, index)), self.memory_kind)

        return self._places(
            {index: jax.tree.map(lambda param, index=index: empty(param, index), params) for index in self.offsets[:-1]}
        )

    def write(self, history: Window, slot: jax.Array, params: Any) -> Window:
        """The history with `params` in place of the snapshot of the visit `slot` (int32, 0 is the oldest), if any."""

        def write_leaf(index: int, new: jax.Array, old: jax.Array) -> jax.Array:
            return put_away(jnp.where(slot == index, new, self._fetch(old)), self.memory_kind)

        def write_difference(index: int, param: jax.Array, first: jax.Array, old: jax.Array) -> jax.Array:
            is_difference = old.dtype != param.dtype
            new = difference(param, self._fetch(first)).astype(old.dtype) if is_difference else param
            return write_leaf(index, new, old)

        # From the first snapshot as it is afterwards: were it needed as it was before, every step would copy it.
        first = jax.tree.map(functools.partial(write_leaf, 0), params, history[0]) if history else ()
        others = {
            index: jax.tree.map(functools.partial(write_difference, index), params, first, history[index])
            for index in self.offsets[1:-1]
        }
        return self._places({0: first, **others})

    def read(self, history: Window) -> Window:
        """The snapshots, as trees of the parameters' own dtypes."""
        history = jax.tree.map(self._fetch, tuple(history[index] for index in self.offsets[:-1]))
        if self.dtype is None or not history:
            return history

        def restore(first: jax.Array, kept: jax.Array) -> jax.Array:
            if kept.dtype == first.dtype:
                return kept
            return (first + kept.astype(wide_dtype(first))).astype(first.dtype)

        return (history[0], *(jax.tree.map(restore, history[0], snapshot) for snapshot in history[1:]))

    def _places(self, snapshots: dict[int, Any]) -> Window:
        return tuple(snapshots.get(index) for index in range(self.offsets[-1]))

    def _dtype(self, param: Any, index: int) -> Any:
        dtype = jnp.result_type(param)
        if index == 0 or self.dtype is None or jnp.finfo(dtype).bits <= jnp.finfo(self.dtype).bits:
            return dtype
        return self.dtype

    def _fetch(self, array: jax.Array) -> jax.Array:
        return fetch(array, self.memory_kind)


@dataclasses.dataclass(frozen=True)
class AveragedWindowFormat:
    """How a running mean of the parameters, and the window of its snapshots, are kept.

    Attributes:
      decay: of the mean, per step.
      window: how the snapshots are kept.
    """

    decay: float
    window: WindowFormat

    def init(self, params: Any) -> AveragedWindow:
        """A mean that has not begun, and empty snapshots."""
        mean = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=wide_dtype(param)), params)
        return AveragedWindow(mean, self.window.init(mean))


@dataclasses.dataclass(frozen=True)
class DriftFormat:
    """How a drift is kept.

    Attributes:
      num_means: how many running means there are.
      dtype: `None`, to keep the means in float32, or as wide as the parameters are where that is wider; or the dtype
        to keep them in.
      memory_kind: see `WindowFormat`.
    """

    num_means: int
    dtype: Any = None
    memory_kind: MemoryKind = None

    def init(self, params: Any) -> DriftHistory:
        """A drift that has not begun, each array in a buffer of its own so that the state can be donated."""

        def empty(param: Any, dtype: Any) -> jax.Array:
            return put_away(jnp.zeros_like(param, dtype=dtype), self.memory_kind)

        def mean() -> Any:
            return jax.tree.map(lambda param: empty(param, self.dtype or wide_dtype(param)), params)

        anchor = jax.tree.map(lambda param: empty(param, None), params)
        return DriftHistory(anchor, tuple(mean() for _ in range(self.num_means)))

    def write_anchor(self, anchor: Any) -> Any:
        """The anchor where it is kept."""
        return jax.tree.map(lambda value: put_away(value, self.memory_kind), anchor)

    def write_means(self, means: tuple[Any, ...]) -> tuple[Any, ...]:
        """The means where and as they are kept."""

        def narrow(value: jax.Array) -> jax.Array:
            return put_away(value if self.dtype is None else value.astype(self.dtype), self.memory_kind)

        return jax.tree.map(narrow, means)

    def read(self, history: DriftHistory) -> DriftHistory:
        """The drift on the device, with means of at least float32."""
        history = jax.tree.map(lambda value: fetch(value, self.memory_kind), history)
        return history._replace(means=jax.tree.map(lambda value: value.astype(wide_dtype(value)), history.means))


HistoryFormat = WindowFormat | AveragedWindowFormat | DriftFormat


def check_history(history: Any, history_format: HistoryFormat, params: Any, nowcaster: Any) -> None:
    """Raises a `ValueError` unless a history is of the kind and the dtypes that `init` would make."""
    remedy = "Go on with the nowcaster and the history_dtype that it was made with, or begin a new one with `init`."
    expected = jax.eval_shape(history_format.init, params)
    # As plain tuples, which a checkpoint may have made of named ones.
    if jax.tree.structure(tuple(history)) != jax.tree.structure(tuple(expected)):
        raise ValueError(
            f"the history in the state is {_kind(history)}, and {type(nowcaster).__name__.lstrip('_')} needs "
            f"{_kind(expected)}, of trees like the parameters. {remedy}"
        )
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(history), strict=True)
    for (path, leaf), actual in leaves:
        if actual.dtype != leaf.dtype:
            place = f"history{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place} in the state is of dtype {actual.dtype}, and not {leaf.dtype}. {remedy}")


def _kind(history: Any) -> str:
    if isinstance(history, DriftHistory):
        return f"a drift of {len(history.means)} running mean{'s' * (len(history.means) != 1)}"
    if isinstance(history, AveragedWindow):
        return f"{_kind(history.window)} of a running mean"
    visits = [index for index, snapshot in enumerate(history) if snapshot is not None]
    which = "" if len(visits) == len(history) else f", of the visits {visits} among {len(history)}"
    return f"a window of {len(visits)} snapshots{which}"


def put_away(array: jax.Array, memory_kind: MemoryKind) -> jax.Array:
    """The array in memory of this kind, or where it is."""
    return array if memory_kind is None else jax.device_put(array, jax.memory.Space.Host)


def fetch(array: jax.Array, memory_kind: MemoryKind) -> jax.Array:
    """The array that was put away, on the device."""
    return array if memory_kind is None else jax.device_put(array, jax.memory.Space.Device)
