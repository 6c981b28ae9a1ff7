"""Windows of trajectories: the examples that nowcasters are trained on."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wnn_jax._roles import ROLES
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Leaf, Trajectory

# Five snapshots, evenly spaced.
OFFSETS = (0, 1, 2, 3, 4)
NUM_HORIZONS = 40
# Windows that reach less far ahead than this are not drawn.
MIN_HORIZON = 5


class Window(NamedTuple):
    """Some weights of one tensor, their history and their future.

    Attributes:
      history: `[context, n]` float32, oldest first.
      targets: `[40, n]` float32, the following snapshots; 0 past the end of the run.
      is_known: `[40]` bool, which of these the run has.
      role: the index in `ROLES` of the tensor's role.
      statistics: what a nowcaster is told of these weights beside their history.
    """

    history: Any
    targets: Any
    is_known: Any
    role: Any
    statistics: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("windows",), meta_fields=("roles",))
@dataclasses.dataclass(frozen=True)
class WindowBatch:
    """Windows of several roles, as many of each.

    Attributes:
      windows: a `Window` whose arrays have one more axis in front.
      roles: the roles of the windows, which take turns: window `i` has the role `roles[i % len(roles)]`.
    """

    windows: Window
    roles: tuple[str, ...]

    def by_role(self) -> dict[str, Window]:
        """Each role with its windows."""
        return {
            role: jax.tree.map(lambda leaf: leaf[offset :: len(self.roles)], self.windows)  # noqa: B023
            for offset, role in enumerate(self.roles)
        }


@dataclasses.dataclass(frozen=True)
class WindowSampler:
    """Draws windows: each is a pure function of a seed and its index, and reads no more than it needs.

    Roles take turns, so that every `len(roles)` windows in a row have one of each. Run, tensor, spacing and time are
    drawn at random.

    Attributes:
      trajectories: the runs to draw from.
      roles: the roles to draw.
      statistics: `(history, chosen) -> statistics`, what the nowcaster is told of some weights of a tensor: of its
        snapshots `[context, *shape]` and the places of these weights, `[num_weights]`, in the flat tensor.
      num_weights: weights per window, drawn with replacement where the tensor has fewer.
      min_stride: the smallest spacing, in snapshots of the run.
      max_stride: the largest spacing. Both give way where a run is too short for them.
      offsets: where the snapshots of a window are, in spacings, from 0 on.
      min_horizon: how far ahead of the last one a window reaches at least, in spacings.
      average: see `read_window`.

    Raises:
      UsageError: if no run has one of the roles, or a run is too short for a window.
    """

    trajectories: Sequence[Trajectory]
    roles: tuple[str, ...]
    statistics: Callable[[Any, Any], Any]
    num_weights: int
    min_stride: int
    max_stride: int
    offsets: tuple[int, ...] = OFFSETS
    min_horizon: int = MIN_HORIZON
    average: bool = False

    def __post_init__(self) -> None:
        shortest = self._reach + 1
        for role in self.roles:
            if not self._candidates[role]:
                raise UsageError(
                    f"--collection has no finished run with role {role!r} for this split; collect more runs."
                )
        if too_short := [t for t in self.trajectories if t.num_snapshots < shortest]:
            raise UsageError(
                f"{too_short[0].file} has {too_short[0].num_snapshots} snapshots, but a window needs {shortest}; "
                "collect with more snapshots per run."
            )

    def window(self, seed: int, index: int) -> Window:
        """The window of a seed and an index, both >= 0."""
        rng = np.random.default_rng([seed, index])
        role = self.roles[index % len(self.roles)]
        candidates = self._candidates[role]
        trajectory, leaves = candidates[rng.integers(len(candidates))]
        leaf = leaves[rng.integers(len(leaves))]
        start, stride = draw_place(rng, trajectory, self._reach, self.min_stride, self.max_stride)
        history, targets = read_window(trajectory, leaf, start, stride, self.offsets, average=self.average)
        size = history.shape[-1]
        chosen = rng.choice(size, self.num_weights, replace=size < self.num_weights)
        padded = np.zeros([NUM_HORIZONS, self.num_weights], np.float32)
        padded[: len(targets)] = targets[:, chosen]
        return Window(
            history=history[:, chosen],
            targets=padded,
            is_known=np.arange(NUM_HORIZONS) < len(targets),
            role=np.int32(ROLES.index(role)),
            statistics=jax.tree.map(np.float32, self.statistics(history.reshape(-1, *leaf.shape), chosen)),
        )

    def batch(self, seed: int, number: int, windows_per_role: int) -> WindowBatch:
        """A batch of consecutive windows, each array with one more axis in front.

        Args:
          seed: of the draws.
          number: of the batch, from 0.
          windows_per_role: windows of each role in it.
        """
        size = windows_per_role * len(self.roles)
        windows = [self.window(seed, index) for index in range(number * size, (number + 1) * size)]
        return WindowBatch(jax.tree.map(lambda *leaves: np.stack(leaves), *windows), self.roles)

    @property
    def _reach(self) -> int:
        """From the first snapshot of the shortest window to its end, in spacings."""
        return self.offsets[-1] + self.min_horizon

    @functools.cached_property
    def _candidates(self) -> dict[str, list[tuple[Trajectory, list[Leaf]]]]:
        """Role -> the runs that have it, each with its tensors of that role."""
        return {
            role: [(t, leaves) for t in self.trajectories if (leaves := [x for x in t.leaves if x.role == role])]
            for role in self.roles
        }


def draw_place(
    rng: np.random.Generator, trajectory: Trajectory, reach: int, min_stride: int, max_stride: int
) -> tuple[int, int]:
    """Draws where a window lies in a run.

    Args:
      rng: draws.
      trajectory: the run.
      reach: from the first snapshot of the shortest window to its end, in spacings.
      min_stride: the smallest spacing, in snapshots of the run.
      max_stride: the largest one. Both give way where the run is too short for them.

    Returns:
      The first snapshot, and the spacing.
    """
    longest = (trajectory.num_snapshots - 1) // reach
    low, high = min(min_stride, longest), min(max_stride, longest)
    stride = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
    return int(rng.integers(trajectory.num_snapshots - reach * stride)), stride


def read_window(
    trajectory: Trajectory,
    leaf: Leaf,
    start: int,
    stride: int,
    offsets: tuple[int, ...] = OFFSETS,
    *,
    average: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one window of one tensor, of one run.

    Args:
      trajectory: the run.
      leaf: the tensor.
      start: the first snapshot.
      stride: the spacing, in snapshots of the run.
      offsets: where the snapshots of the history are, in spacings, from 0 on.
      average: reads the running mean of the snapshots with a memory of one spacing, which begins as the first snapshot
        of the run, as `wnn_jax.nowcast(average=...)` has it of the weights. What was 20 spacings before `start` counts
        as the beginning: its share of a mean is less than a float's last digit.

    Returns:
      The history `[context, size]`, and as much as there is of the future `[<= 40, size]`.
    """
    last = offsets[-1]
    stop = start + (last + NUM_HORIZONS) * stride + 1
    if average:
        begin = max(start - 20 * stride, 0)
        rows = _running_mean(trajectory.snapshots[begin:stop, leaf.columns], memory=stride)[start - begin :: stride]
    else:
        rows = trajectory.snapshots[start:stop:stride, leaf.columns]
    return np.array(rows[list(offsets)]), np.array(rows[last + 1 :])


def _running_mean(rows: np.ndarray, memory: float) -> np.ndarray:
    """The exponential moving average of rows, which begins as the first one; `memory` is in rows."""
    from scipy import signal  # Not needed by what draws no running means, and slow to import.

    decay = math.exp(-1 / memory)
    first = rows[0].astype(np.float64)
    means, _ = signal.lfilter([1 - decay], [1, -decay], rows.astype(np.float64), axis=0, zi=decay * first[None])
    return means.astype(np.float32)
