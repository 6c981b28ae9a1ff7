"""Trajectories: the weights of training runs over time, on disk.

A collection is a folder with one file per finished run, such as `run-00042.npz`. It holds

- `snapshots`: float32 `[num_snapshots, num_weights]`. Half precision would not do: forecasts are made from differences
  between snapshots, which are small late in training.
- `losses`: float32 `[num_snapshots]`, the mean training loss before each snapshot.
- a header: the task family, the settings of the run, its split, its tensors, and its validation scores.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import struct
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import msgspec
import numpy as np

from wnn_jax._roles import ROLES, default_roles
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting._arrays import read_arrays, write_arrays
from wnn_jax.lab.tasks.families import RunSettings, SplitName, TaskFamily

_FORMAT = "wnn_jax.trajectory.4"
_RUN = re.compile(r"run-(\d{5,})\.npz")

_Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a network.

    Attributes:
      name: its path.
      role: its role.
      shape: its shape.
      columns: its columns in the array of snapshots.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    columns: slice


@dataclasses.dataclass(frozen=True)
class _Header:
    family: TaskFamily
    index: int
    settings: RunSettings
    split: SplitName
    leaves: tuple[tuple[str, str, tuple[_Positive, ...]], ...]
    validation: Mapping[str, float | None]
    diverged: bool


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A finished run.

    Attributes:
      file: the file of the run.
      family: the task family that the run was drawn from.
      index: the index of the run in its family.
      settings: what was trained, and how.
      split: what the run is used for.
      leaves: the tensors of the network.
      num_snapshots: the number of snapshots.
      losses: the mean training loss before each snapshot.
      validation: metric -> score on the validation data after the last step; without scores that are not finite.
      diverged: whether a loss, a score or a weight is not finite. Such a run has no snapshots.
      sha256: the checksum of the snapshots.
    """

    file: Path
    family: TaskFamily
    index: int
    settings: RunSettings
    split: SplitName
    leaves: tuple[Leaf, ...]
    num_snapshots: int
    losses: tuple[float, ...]
    validation: Mapping[str, float]
    diverged: bool
    sha256: str

    @functools.cached_property
    def snapshots(self) -> np.ndarray:
        """`[num_snapshots, num_weights]`, mapped into memory: only what is used is read.

        Raises:
          UsageError: if the file was damaged or changed since the trajectory was read.
        """
        if read_trajectory(self.file).sha256 != self.sha256:
            raise UsageError(f"{self.file} was changed while it was in use. Start again.")
        return _map_array(self.file, "snapshots")


def run_file(folder: Path, index: int) -> Path:
    """Return the file of a run. It exists when the run is finished."""
    return folder / f"run-{index:05d}.npz"


def finished_runs(folder: Path) -> set[int]:
    """Return the indices of the finished runs in a folder, which need not exist.

    Raises:
      UsageError: if the folder holds a collection in an older format.
    """
    if (folder / "manifest.json").exists():
        raise UsageError(
            f"{folder} holds a collection of wnn_jax 0.1 (it has a manifest.json). This version does not read it: use "
            "the wnn_jax that wrote it, or collect again into another folder."
        )
    files = folder.iterdir() if folder.is_dir() else ()
    return {int(match[1]) for file in files if (match := _RUN.fullmatch(file.name))}


def check_family(folder: Path, family: TaskFamily) -> None:
    """Refuse a folder that holds runs of another family.

    Raises:
      UsageError: names the settings that differ.
    """
    for index in sorted(finished_runs(folder))[:1]:
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
    """Write a finished run, whole or not at all.

    Args:
      folder: the folder of the collection.
      family: the task family that the run was drawn from.
      index: the index of the run in its family.
      snapshots: trees of parameters.
      losses: the mean training loss before each snapshot.
      validation: metric -> score on the validation data after the last step.
    """
    rows = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in snapshots]
    arrays = {"snapshots": np.stack(rows).astype(np.float32), "losses": np.asarray(losses, np.float32)}
    scores = {name: float(score) for name, score in validation.items()}
    diverged = not all(np.isfinite(values).all() for values in (*arrays.values(), list(scores.values())))
    named = jax.tree_util.tree_leaves_with_path(snapshots[0])
    roles = jax.tree.leaves(default_roles(snapshots[0]))
    header = _Header(
        family=family,
        index=index,
        settings=family.settings(index),
        split=family.split(index),
        leaves=tuple(
            (jax.tree_util.keystr(path, simple=True, separator="/"), role, np.shape(leaf))
            for (path, leaf), role in zip(named, roles, strict=True)
        ),
        validation={name: score if math.isfinite(score) else None for name, score in scores.items()},
        diverged=diverged,
    )
    write_arrays(
        run_file(folder, index), {} if diverged else arrays, {"format": _FORMAT, **msgspec.to_builtins(header)}
    )


def load_trajectories(folders: Iterable[Path]) -> list[Trajectory]:
    """Read all finished runs of some collections, except those that diverged.

    Raises:
      UsageError: if a file is damaged or under the name of another run, a folder has no runs or runs of two families,
        a group of runs is in two splits, or two folders hold the same run.
    """
    runs: dict[tuple[str, int], Trajectory] = {}
    groups: dict[tuple[str, int], Trajectory] = {}
    for folder in folders:
        indices = sorted(finished_runs(folder))
        if not indices:
            raise UsageError(f"--collection {folder} holds no finished runs; make some with: wnn-jax collect")
        trajectories = [read_trajectory(run_file(folder, index)) for index in indices]
        for run in trajectories:
            name, family = run.family.name, trajectories[0].family
            if run.family != family:
                raise UsageError(
                    f"{run.file} and {trajectories[0].file} are runs of two task families. Move the runs of one family "
                    "to another folder."
                )
            if (other := runs.setdefault((name, run.index), run)) is not run:
                raise UsageError(
                    f"--collection {other.file.parent} {folder}: both have run {run.index} of the family {name!r}; "
                    "name collections that share no runs."
                )
            if (other := groups.setdefault((name, run.index // family.group_size), run)).split != run.split:
                raise UsageError(
                    f"{run.file} is in the split {run.split!r}, but {other.file} of the same group is in "
                    f"{other.split!r}. Splits must be disjoint: collect again into another folder."
                )
    return [run for run in runs.values() if not run.diverged]


def read_trajectory(file: Path) -> Trajectory:
    """Read the file of a run, and compare it with its checksum.

    A process reads a file once, as long as its size and time stay the same.

    Raises:
      UsageError: if the file is damaged, was written by another version, or cannot be read.
    """
    try:
        status = file.stat()
        return _read(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error


@functools.cache
def _read(file: Path, size: int, modified_ns: int) -> Trajectory:
    del size, modified_ns
    with _damage_named(file):
        content, arrays = read_arrays(file)
    if content.get("format") != _FORMAT:
        raise UsageError(
            f"{file} has the format {content.get('format')!r}, but this wnn_jax reads {_FORMAT!r}. Use the wnn_jax "
            "that wrote it, or collect again into another folder."
        )
    with _damage_named(file):
        header = msgspec.convert(content, _Header)
        if run_file(file.parent, header.index) != file or header.family.group_size < 1:
            raise ValueError(f"it is run {header.index} of groups of {header.family.group_size}")
        leaves = _place(header.leaves)
        shape = (len(arrays.get("losses", ())), leaves[-1].columns.stop)
        snapshots = np.zeros(shape, np.float32) if header.diverged else arrays["snapshots"]
        if snapshots.shape != shape or snapshots.dtype != np.float32 or (shape[0] == 0) != header.diverged:
            raise ValueError(f"its snapshots are {snapshots.dtype} {snapshots.shape}, not float32 {shape}")
    fields: dict[str, Any] = {
        **vars(header),
        "leaves": leaves,
        "losses": tuple(arrays.get("losses", np.zeros([0])).tolist()),
        "validation": {name: score for name, score in header.validation.items() if score is not None},
    }
    return Trajectory(
        **fields, file=file, num_snapshots=len(snapshots), sha256=hashlib.sha256(snapshots.tobytes()).hexdigest()
    )


@contextlib.contextmanager
def _damage_named(file: Path) -> Generator[None]:
    """Turn an error of wrong content into a `UsageError` that says what to do."""
    try:
        yield
    except (ValueError, KeyError, msgspec.ValidationError) as error:
        problem = str(error) if str(file) in str(error) else f"{file} is damaged: {error}."
        raise UsageError(f"{problem} Remove it and collect again: only this run is repeated.") from error


def _place(leaves: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Leaf, ...]:
    """Give tensors their columns, one tensor after the other."""
    placed: list[Leaf] = []
    start = 0
    for name, role, shape in leaves:
        if role not in ROLES:
            raise ValueError(f"its tensor {name!r} has the unknown role {role!r}")
        placed.append(Leaf(name, role, shape, slice(start, start + math.prod(shape))))
        start = placed[-1].columns.stop
    if not placed:
        raise ValueError("it has no tensors")
    return tuple(placed)


def _map_array(file: Path, name: str) -> np.ndarray:
    """Map an array of an uncompressed `.npz` file into memory, which NumPy does for `.npy` files only."""
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(f"{name}.npy").header_offset
    with file.open("rb") as opened:
        # The lengths of the name and of the extra field end the 30 bytes of a zip member's own header.
        opened.seek(start + 26)
        opened.seek(start + 30 + sum(struct.unpack("<HH", opened.read(4))))
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        return np.memmap(opened, dtype, "r", opened.tell(), shape)
