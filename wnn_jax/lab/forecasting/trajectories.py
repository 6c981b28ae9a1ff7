"""Trajectories: the weights of training runs over time, on disk.

A collection is a folder with one file per finished run, such as `run-00042.npz`. It holds

- `snapshots`: float32 `[num_snapshots, num_weights]`. Half precision would not do: forecasts are made from differences
  between snapshots, which are small late in training.
- `losses`: float32 `[num_snapshots]`, the mean training loss before each snapshot.
- a header: the task family, the settings of the run, its tensors, and its validation scores.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wnn_jax._files import read_arrays, write_arrays
from wnn_jax._roles import default_roles
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.families import RunSettings, SplitName, TaskFamily

_FORMAT = "wnn_jax.trajectory.4"
_RUN = re.compile(r"run-(\d{5,})\.npz")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a network: its path, role and shape, and its columns in the array of snapshots."""

    name: str
    role: str
    shape: tuple[int, ...]
    columns: slice


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A finished run, in memory: about 12 MB for one of the family `small`.

    `validation` maps metrics to scores on the validation data after the last step, or to `None` if they are not finite.
    A run `diverged` if a loss, a score or a weight is not finite. Such a run has no snapshots and no losses.
    """

    file: Path
    family: TaskFamily
    index: int
    leaves: tuple[Leaf, ...]
    validation: Mapping[str, float | None]
    diverged: bool
    snapshots: np.ndarray
    losses: tuple[float, ...]

    @functools.cached_property
    def settings(self) -> RunSettings:
        """What was trained, and how."""
        return self.family.settings(self.index)

    @functools.cached_property
    def split(self) -> SplitName:
        """What the run is used for: the same for all runs of a group."""
        return self.family.split(self.index)


def run_file(folder: Path, index: int) -> Path:
    """Return the file of a run. It exists when the run is finished."""
    return folder / f"run-{index:05d}.npz"


def finished_runs(folder: Path) -> list[int]:
    """Return the sorted indices of the finished runs in a folder, which need not exist."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(match[1]) for file in files if (match := _RUN.fullmatch(file.name)))


def check_family(folder: Path, family: TaskFamily) -> None:
    """Refuse a folder with runs of another family. The `UsageError` names the settings that differ."""
    for index in finished_runs(folder)[:1]:
        before, after = map(vars, (read_trajectory(run_file(folder, index)).family, family))
        if changed := sorted(name for name in after if before[name] != after[name]):
            raise UsageError(
                f"--output {folder} holds runs of another task family, which differs in {', '.join(changed)}. Collect "
                "into another folder."
            )


def save_trajectory(
    folder: Path,
    family: TaskFamily,
    index: int,
    snapshots: Sequence[Any],
    losses: Sequence[float],
    validation: Mapping[str, float],
) -> None:
    """Write a finished run, whole or not at all. `snapshots` are trees of parameters; see `Trajectory` for the rest."""
    rows = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in snapshots]
    arrays = {"snapshots": np.stack(rows).astype(np.float32), "losses": np.asarray(losses, np.float32)}
    scores = {name: float(score) if math.isfinite(score) else None for name, score in validation.items()}
    diverged = None in scores.values() or not all(np.isfinite(array).all() for array in arrays.values())
    names = jax.tree_util.tree_leaves_with_path(snapshots[0])
    header = {
        "format": _FORMAT,
        "family": dataclasses.asdict(family),
        "index": index,
        "settings": dataclasses.asdict(family.settings(index)),
        "leaves": [
            (jax.tree_util.keystr(path, simple=True, separator="/"), role, np.shape(leaf))
            for (path, leaf), role in zip(names, jax.tree.leaves(default_roles(snapshots[0])), strict=True)
        ],
        "validation": scores,
        "diverged": diverged,
    }
    write_arrays(run_file(folder, index), {} if diverged else arrays, header)


def load_trajectories(folders: Iterable[Path]) -> list[Trajectory]:
    """Read all finished runs of some collections that did not diverge.

    A file that is damaged, a folder without runs or with runs of two families, or a run in two folders, is a
    `UsageError`.
    """
    runs: dict[tuple[str, int], Trajectory] = {}
    for folder in folders:
        trajectories = [read_trajectory(run_file(folder, index)) for index in finished_runs(folder)]
        if not trajectories:
            raise UsageError(f"--collection {folder} holds no finished runs; make some with: wnn-jax collect")
        first = trajectories[0]
        for run in trajectories:
            if run.family != first.family:
                raise UsageError(f"{run.file} and {first.file} are of two task families. Move one to another folder.")
            if other := runs.get((run.family.name, run.index)):
                raise UsageError(
                    f"--collection {other.file.parent} {folder}: both have run {run.index} of the family "
                    f"{run.family.name!r}; name collections that share no runs."
                )
            runs[run.family.name, run.index] = run
    return [run for run in runs.values() if not run.diverged]


def read_trajectory(file: Path) -> Trajectory:
    """Read the file of a run. A file that is damaged, or in another format, is a `UsageError`."""
    remedy = "Remove it and collect again: only this run is repeated."
    try:
        header, arrays = read_arrays(file, remedy=remedy)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}" if isinstance(error, OSError) else str(error)) from error
    if header.get("format") != _FORMAT:
        raise UsageError(
            f"{file} has the format {header.get('format')!r}, but this wnn_jax reads {_FORMAT!r}. Use the wnn_jax "
            "that wrote it, or collect again into another folder."
        )
    family, index = TaskFamily(**_tuples(header["family"])), header["index"]
    # So nobody trains on a run of an architecture that was held out.
    if run_file(file.parent, index) != file or header["settings"] != dataclasses.asdict(family.settings(index)):
        raise UsageError(f"{file} is not the run {index} of the family {family.name!r} that it says it is. {remedy}")
    ends = np.cumsum([math.prod(shape) for _, _, shape in header["leaves"]]).tolist()
    leaves = tuple(
        Leaf(name, role, tuple(shape), slice(end - math.prod(shape), end))
        for (name, role, shape), end in zip(header["leaves"], ends, strict=True)
    )
    snapshots = arrays.get("snapshots", np.zeros([0, ends[-1]], np.float32))
    losses = tuple(arrays["losses"].tolist()) if arrays else ()
    return Trajectory(file, family, index, leaves, header["validation"], header["diverged"], snapshots, losses)


def _tuples(value: Any) -> Any:
    """Turn the lists of a JSON value into tuples."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
