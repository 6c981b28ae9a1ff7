"""Windows of trajectories: the examples that nowcasters are trained on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wnn_jax._roles import ROLES
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.trajectories import Leaf, Trajectory

CONTEXT = 5
NUM_HORIZONS = 40
# Every window reaches at least this many snapshots ahead.
MIN_HORIZON = 5
# The smallest and the largest spacing of the snapshots in a window, in snapshots of the run.
STRIDES = (4, 16)


class Window(NamedTuple):
    """The history and the future of some weights of one tensor."""

    history: Any  # `[5, n]` float32, evenly spaced snapshots, oldest first.
    targets: Any  # `[40, n]` float32, the following snapshots; 0 past the end of the run.
    is_known: Any  # `[40]` bool, which of the following snapshots the run has.
    role: Any  # The index in `ROLES` of the tensor's role.
    statistics: Any  # What the nowcaster knows about these weights, in addition to their history.


@functools.partial(jax.tree_util.register_dataclass, data_fields=("windows",), meta_fields=("roles",))
@dataclasses.dataclass(frozen=True)
class WindowBatch:
    """Windows of several roles, in turn: window `i` has the role `roles[i % len(roles)]`."""

    windows: Window  # Its arrays have one more axis in front.
    roles: tuple[str, ...]

    def by_role(self) -> dict[str, Window]:
        """Return the windows of each role."""
        return {
            role: jax.tree.map(lambda leaf: leaf[offset :: len(self.roles)], self.windows)  # noqa: B023
            for offset, role in enumerate(self.roles)
        }


@dataclasses.dataclass(frozen=True)
class WindowSampler:
    """Draws windows of some roles. Each is a pure function of a seed and its index.

    Roles take turns. Run, tensor, spacing and time are random. Runs that are short have smaller spacings. A window has
    `num_weights` weights, drawn with replacement from a smaller tensor. `statistics` is `(history, chosen) -> tree`,
    what the nowcaster knows about these weights in addition to their history. There, `history` is `[5, *shape]`, the
    snapshots of the tensor, and `chosen` are indices in the flat tensor.

    A role without a run, or a run that is too short for a window, is a `UsageError`.
    """

    trajectories: Sequence[Trajectory]
    roles: tuple[str, ...]
    statistics: Callable[[Any, Any], Any]
    num_weights: int

    def __post_init__(self) -> None:
        for role in self.roles:
            if not self._runs_with[role]:
                raise UsageError(f"--collection has no finished run with role {role!r} in a split; collect more runs.")
        shortest = CONTEXT + MIN_HORIZON
        for run in self.trajectories:
            if len(run.snapshots) < shortest:
                raise UsageError(
                    f"{run.file} has {len(run.snapshots)} snapshots, but a window needs {shortest}; collect with more "
                    "snapshots per run."
                )

    def window(self, seed: int, index: int) -> Window:
        """Draw the window of a seed and an index, both >= 0."""
        rng = np.random.default_rng([seed, index])
        role = self.roles[index % len(self.roles)]
        runs = self._runs_with[role]
        trajectory, leaves = runs[rng.integers(len(runs))]
        leaf = leaves[rng.integers(len(leaves))]
        length = CONTEXT - 1 + MIN_HORIZON
        num_snapshots = len(trajectory.snapshots)
        low, high = (min(stride, (num_snapshots - 1) // length) for stride in STRIDES)
        stride = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
        start = int(rng.integers(num_snapshots - length * stride))
        history, targets = read_window(trajectory, leaf, start, stride)
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
        """Draw the batch of a number: consecutive windows, stacked."""
        size = windows_per_role * len(self.roles)
        windows = [self.window(seed, index) for index in range(number * size, (number + 1) * size)]
        return WindowBatch(jax.tree.map(lambda *leaves: np.stack(leaves), *windows), self.roles)

    @functools.cached_property
    def _runs_with(self) -> dict[str, list[tuple[Trajectory, list[Leaf]]]]:
        """Role -> the runs that have it, each with its tensors of the role."""
        return {
            role: [(run, leaves) for run in self.trajectories if (leaves := [x for x in run.leaves if x.role == role])]
            for role in self.roles
        }


def read_window(
    trajectory: Trajectory, leaf: Leaf, start: int, stride: int, context: int = CONTEXT
) -> tuple[np.ndarray, np.ndarray]:
    """Return the history `[context, size]` of a whole tensor, and its future `[<= 40, size]` as far as the run goes.

    The window begins at the snapshot `start`, and is spaced by `stride` snapshots of the run.
    """
    stop = start + (context - 1 + NUM_HORIZONS) * stride + 1
    rows = trajectory.snapshots[start:stop:stride, leaf.columns]
    return rows[:context], rows[context:]
