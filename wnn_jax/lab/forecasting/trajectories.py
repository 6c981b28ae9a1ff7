"""Trajectories: the weights of training runs over time, on disk.

A collection is a folder with one file per finished run, such as `run-00042.npz`. It holds

- `snapshots`: float32 `[num_snapshots, num_weights]`. Half precision would not do: forecasts are made from differences
  between snapshots, which are small late in training.
- `losses`: float32 `[num_snapshots]`, the mean training loss before each snapshot.
- a header: the task family, the settings of the run, its tensors, and its validation scores.
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

from wnn_jax._files import read_arrays, write_arrays
from wnn_jax._roles import ROLES, default_roles
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.families import RunSettings, SplitName, TaskFamily

_FORMAT = "wnn_jax.trajectory.4"
_RUN = re.compile(r"run-(\d{5,})\.npz")

_Shape = tuple[Annotated[int, msgspec.Meta(ge=1)], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a network: its path, role and shape, and its columns in the array of snapshots."""

    name: str
    role: str
    shape: tuple[int, ...]
    columns: slice


@dataclasses.dataclass(frozen=True)
class _Header:
    family: TaskFamily
    index: int
    settings: RunSettings
    leaves: tuple[tuple[str, str, _Shape], ...]
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
      leaves: the tensors of the network.
      losses: the mean training loss before each snapshot.
      validation: metric -> score on the validation data after the last step, `None` if it is not finite.
      diverged: whether a loss, a score or a weight is not finite. Such a run has no snapshots.
      sha256: the checksum of the snapshots.
    """

    file: Path
    family: TaskFamily
    index: int
    settings: RunSettings
    leaves: tuple[Leaf, ...]
    losses: tuple[float, ...]
    validation: Mapping[str, float | None]
    diverged: bool
    sha256: str

    @property
    def num_snapshots(self) -> int:
        """The number of snapshots."""
        return len(self.losses)

    @functools.cached_property
    def split(self) -> SplitName:
        """What the run is used for: the same for all runs of a group."""
        return self.family.split(self.index)

    @functools.cached_property
    def snapshots(self) -> np.ndarray:
        """`[num_snapshots, num_weights]`, mapped into memory: only what is used is read."""
        if read_trajectory(self.file).sha256 != self.sha256:
            raise UsageError(f"{self.file} was changed while it was in use. Start again.")
        return _map_array(self.file, "snapshots")


def run_file(folder: Path, index: int) -> Path:
    """Return the file of a run. It exists when the run is finished."""
    return folder / f"run-{index:05d}.npz"


def finished_runs(folder: Path) -> list[int]:
    """Return the sorted indices of the finished runs in a folder, which need not exist."""
    if (folder / "manifest.json").exists():
        raise UsageError(
            f"{folder} holds a collection of wnn_jax 0.1 (it has a manifest.json). This version does not read it: use "
            "the wnn_jax that wrote it, or collect again into another folder."
        )
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
    leaves = tuple(
        (jax.tree_util.keystr(path, simple=True, separator="/"), role, np.shape(leaf))
        for (path, leaf), role in zip(names, jax.tree.leaves(default_roles(snapshots[0])), strict=True)
    )
    header = _Header(family, index, family.settings(index), leaves, scores, diverged)
    content = {"format": _FORMAT, **msgspec.to_builtins(header)}
    write_arrays(run_file(folder, index), {} if diverged else arrays, content)


def load_trajectories(folders: Iterable[Path]) -> list[Trajectory]:
    """Read all finished runs of some collections, except those that diverged.

    Raises:
      UsageError: if a file is damaged, a folder has no runs or runs of two families, or two folders hold the same run.
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
    """Read the file of a run, and compare it with its checksum.

    A process reads a file once, as long as its size and time stay the same. A file that is damaged, or in another
    format, is a `UsageError`.
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
        if run_file(file.parent, header.index) != file:
            raise ValueError(f"it is run {header.index}")
        # So nobody trains on a run of an architecture that was held out.
        if header.settings != header.family.settings(header.index):
            raise ValueError(f"its settings are not those of run {header.index} of its family")
        leaves = _place(header.leaves)
        losses = tuple(arrays["losses"].tolist()) if not header.diverged else ()
        shape = (len(losses), leaves[-1].columns.stop)
        snapshots = arrays["snapshots"] if not header.diverged else np.zeros(shape, np.float32)
        if snapshots.shape != shape or snapshots.dtype != np.float32 or header.diverged == bool(losses):
            raise ValueError(f"its snapshots are {snapshots.dtype} {snapshots.shape}, not float32 {shape}")
    fields: dict[str, Any] = {**vars(header), "leaves": leaves, "losses": losses}
    return Trajectory(**fields, file=file, sha256=hashlib.sha256(snapshots.tobytes()).hexdigest())


@contextlib.contextmanager
def _damage_named(file: Path) -> Generator[None]:
    """Turn an error about the content of a file into a `UsageError` that says what to do."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # What other content raises is no closed set.
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
        # The last 4 of the 30 bytes of a zip member's own header are the lengths of the name and of the extra field.
        opened.seek(start + 26)
        opened.seek(start + 30 + sum(struct.unpack("<HH", opened.read(4))))
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        return np.memmap(opened, dtype, "r", opened.tell(), shape)
