"""How far forecasts are off, on whole runs, by horizon, role, stage and spacing."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import wnn_jax
from wnn_jax._window import DEFAULT_HORIZON
from wnn_jax.lab.forecasting.collection import Trajectory
from wnn_jax.lab.forecasting.windows import MIN_HORIZON, read_window
from wnn_jax.lab.output import add_legend, new_figure

HORIZONS = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40)
STAGES = ("early", "middle", "late")
_STRIDES = (2, 8)
# Of a plot: where shares beyond these are drawn, and what the axis names.
_SHOWN = (0.1, 5.0)
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0)

ErrorRow = dict[str, Any]


def forecast_errors(
    label: str,
    nowcaster: wnn_jax.Nowcaster,
    scale: float,
    trajectories: Iterable[Trajectory],
    *,
    average: bool = False,
) -> Iterator[list[ErrorRow]]:
    """Sums of absolute errors, and those of forecasting no change.

    Every run is read in windows at its beginning, its middle and its end, at two spacings.

    Args:
      label: the nowcaster's name in the rows.
      nowcaster: what forecasts.
      scale: multiplies its jumps.
      trajectories: the runs.
      average: see `read_window`.

    Yields:
      For every run, a row per role, stage, spacing and horizon. A nowcaster that takes no horizon has rows for
      its own one only.
    """
    offsets = tuple(range(nowcaster.context))
    takes_horizon = getattr(nowcaster, "takes_horizon", True)
    horizons = HORIZONS if takes_horizon else (getattr(nowcaster, "default_horizon", DEFAULT_HORIZON),)
    compiled: dict[Any, Any] = {}
    for trajectory in trajectories:
        rows: list[ErrorRow] = []
        # Runs of one architecture share a program.
        signature = tuple((leaf.name, leaf.role, leaf.shape) for leaf in trajectory.leaves)
        if signature not in compiled:
            compiled[signature] = jax.jit(
                _NowcasterOfRoles(nowcaster, {leaf.name: leaf.role for leaf in trajectory.leaves})
            )
        for stage, start, stride in _windows(trajectory, offsets[-1] + max(MIN_HORIZON, horizons[0])):
            windows = {
                leaf.name: read_window(trajectory, leaf, start, stride, offsets, average=average)
                for leaf in trajectory.leaves
            }
            history = [
                {leaf.name: jnp.asarray(windows[leaf.name][0][time].reshape(leaf.shape)) for leaf in trajectory.leaves}
                for time in range(len(offsets))
            ]
            known = min(len(future) for _, future in windows.values())
            for horizon in (h for h in horizons if h <= known):
                forecast = jax.device_get(compiled[signature](history, jnp.int32(horizon)))
                by_role: dict[str, list[float]] = {}
                for leaf in trajectory.leaves:
                    past, future = windows[leaf.name]
                    last, actual = past[-1], future[horizon - 1]
                    predicted = last + scale * (forecast[leaf.name].reshape(-1) - last)
                    sums = by_role.setdefault(leaf.role, [0.0, 0.0])
                    sums[0] += float(np.abs(predicted - actual).sum(dtype=np.float64))
                    sums[1] += float(np.abs(last - actual).sum(dtype=np.float64))
                rows += [
                    {
                        "nowcaster": label,
                        "run": f"{trajectory.family} {trajectory.index}",
                        "split": trajectory.split,
                        "task": f"{trajectory.settings.architecture} on {trajectory.settings.dataset}",
                        "optimizer": trajectory.settings.optimizer,
                        "stage": stage,
                        "spacing": stride * trajectory.settings.snapshot_every,
                        "horizon": horizon,
                        "role": role,
                        "error": error,
                        "no_change": no_change,
                    }
                    for role, (error, no_change) in by_role.items()
                ]
        yield rows


def can_forecast(nowcaster: wnn_jax.Nowcaster, trajectory: Trajectory) -> bool:
    """Whether a nowcaster forecasts the network of a run: NiNo does not where the graph cannot be read."""
    check_params = getattr(nowcaster, "check_params", None)
    if check_params is None:
        return True
    shapes = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in trajectory.leaves}
    try:
        check_params(shapes, {leaf.name: leaf.role for leaf in trajectory.leaves})
    except ValueError:
        return False
    return True


def say_what_is_left_out(trajectories: Iterable[Trajectory], used: Iterable[Trajectory], reason: str) -> None:
    """Prints the architectures of runs that are not used, if there are any."""
    kept = {id(trajectory) for trajectory in used}
    left_out = sorted({each.settings.architecture for each in trajectories if id(each) not in kept})
    if left_out:
        Console().print(f"left out, because {reason}: {', '.join(left_out)}", soft_wrap=True)


def share(rows: Iterable[ErrorRow], **wanted: Any) -> float:
    """The error as a share of that of forecasting no change: the mean over runs, NaN if there is no such row."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            total = sums.setdefault((row["split"], row["run"]), [0.0, 0.0])
            total[0] += row["error"]
            total[1] += row["no_change"]
    shares = [error / no_change for error, no_change in sums.values() if no_change > 0]
    return statistics.mean(shares) if shares else math.nan


def plot_forecast_errors(rows: Sequence[ErrorRow], path: Path) -> None:
    """Draws the error against the horizon for every nowcaster, and for the last value.

    Args:
      rows: what `forecast_errors` yielded.
      path: of a PNG file.
    """
    splits = list(dict.fromkeys(row["split"] for row in rows))
    size = (6.5 * len(splits), 5)
    with new_figure(path, 1, len(splits), figsize=size, sharey=True, squeeze=False) as (figure, axes):
        for axis, split in zip(axes[0], splits, strict=True):
            number = len({row["run"] for row in rows if row["split"] == split})
            axis.set(xscale="log", yscale="log", xlabel="horizon in snapshots", title=f"{split} (n={number})")
            axis.set_xticks(HORIZONS, [str(horizon) for horizon in HORIZONS])
            axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
            axis.minorticks_off()
            for color, label in enumerate(dict.fromkeys(row["nowcaster"] for row in rows)):
                drawn = [row for row in rows if row["nowcaster"] == label and row["split"] == split]
                horizons = sorted({row["horizon"] for row in drawn})
                shares = [share(drawn, horizon=horizon) for horizon in horizons]
                # A single dot, that of a nowcaster without horizons, must not hide in the line of another one.
                marker = {"marker": "o", "markersize": 4} if len(horizons) > 1 else {"marker": "D", "fillstyle": "none"}
                axis.plot(horizons, np.clip(shares, *_SHOWN), color=f"C{color}", label=label, clip_on=False, **marker)
            axis.axhline(1.0, color="0.4", linestyle=":", linewidth=1, label="last value")
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel(f"error, as a share of that of the last value ({_SHOWN[1]:g}: or more)")
        add_legend(figure, *axes[0, 0].get_legend_handles_labels(), fontsize=9)


class _NowcasterOfRoles:
    """A nowcaster bound to the roles of one architecture."""

    def __init__(self, nowcaster: wnn_jax.Nowcaster, roles: Mapping[str, str]) -> None:
        self._nowcaster = nowcaster
        self._roles = dict(roles)

    def __call__(self, history: Sequence[Any], horizon: jax.Array) -> Any:
        takes_horizon = getattr(self._nowcaster, "takes_horizon", True)
        return self._nowcaster(history, self._roles, horizon if takes_horizon else None)


def _windows(trajectory: Trajectory, reach: int) -> list[tuple[str, int, int]]:
    """Stage, first snapshot and stride of the windows to read, which are so many strides long."""
    windows: list[tuple[str, int, int]] = []
    for stride in _STRIDES:
        starts = trajectory.num_snapshots - reach * stride
        if starts > 0:
            windows += [
                (stage, int(place * (starts - 1)), stride) for stage, place in zip(STAGES, (0, 0.5, 1), strict=True)
            ]
    return windows
