"""Trajectories, the weights of training runs over time, on disk.

A collection is a folder with `manifest.json`, which says how its runs were drawn, and two files per finished run:
`run-00042.npy`, its snapshots as one float32 array `[num_snapshots, num_weights]` (NumPy's own format, which can be
read in parts without loading the rest), and `run-00042.json`, its record: what was trained, the split that the run
belongs to, the name, role, shape and first column of every tensor, the training losses, the scores on validation data
after the last step, whether the run diverged, and the checksum of the array. Manifest and records have checksums of
their own. Weights are kept in full: a forecast is made from differences between snapshots, which half precision would
drown late in training.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import msgspec
import numpy as np

from wnn_jax._files import replace_on_success
from wnn_jax._roles import ROLES, default_roles
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.records import check_record, load_json, write_record
from wnn_jax.lab.tasks.families import RunSettings, SplitName, TaskFamily
from wnn_jax.lab.training.keys import run_key

_FORMAT = "wnn_jax.trajectories"
_VERSION = 3
_RECORD = re.compile(r"run-(\d{5,})\.json")

_Positive = Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a network.

    Attributes:
      name: its path.
      role: its role.
      shape: its shape.
      start: the column of its first weight.

    Raises:
      ValueError: if the role is not known.
    """

    name: str
    role: str
    shape: tuple[_Positive, ...]
    start: int

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"the leaf {self.name!r} has the unknown role {self.role!r}")

    @property
    def columns(self) -> slice:
        """Its columns in the array of snapshots."""
        return slice(self.start, self.start + math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """How the runs of a collection were drawn."""

    format: str
    version: int
    family: TaskFamily

    def __post_init__(self) -> None:
        if self.family.group_size < 1:
            raise ValueError(f"the family has the group_size {self.family.group_size}")


@dataclasses.dataclass(frozen=True)
class _Record:
    """The record of a finished run: see `Trajectory`. The family is its manifest's `run_key`."""

    family: str
    index: int
    settings: RunSettings
    split: SplitName
    leaves: tuple[Leaf, ...]
    num_snapshots: _Positive
    losses: tuple[float | None, ...]
    validation: Mapping[str, float | None]
    diverged: bool
    sha256: str

    def __post_init__(self) -> None:
        stops = [leaf.columns.stop for leaf in self.leaves]
        if not stops or [leaf.start for leaf in self.leaves] != [0, *stops[:-1]]:
            raise ValueError("its leaves are not one behind the other, from column 0 on")
        if len(self.losses) != self.num_snapshots:
            raise ValueError(f"it has {len(self.losses)} losses for {self.num_snapshots} snapshots")
        if not self.diverged and None in (*self.losses, *self.validation.values()):
            raise ValueError("it has a loss or a score that is not finite, but did not diverge")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A finished run.

    Attributes:
      family: the name of the family that the run belongs to.
      index: its index in the family.
      settings: what was trained, and how.
      split: what the run is for.
      leaves: the tensors of the network.
      num_snapshots: how many snapshots there are.
      losses: the mean training loss before each snapshot.
      validation: metric -> score on the validation data after the last step.
      diverged: whether a loss, a score or a weight is not finite.
      file: the array of snapshots.
      sha256: the checksum of that file.
    """

    family: str
    index: int
    settings: RunSettings
    split: SplitName
    leaves: tuple[Leaf, ...]
    num_snapshots: int
    losses: tuple[float, ...]
    validation: Mapping[str, float]
    diverged: bool
    file: Path
    sha256: str

    @functools.cached_property
    def snapshots(self) -> np.ndarray:
        """`[num_snapshots, num_weights]`, mapped into memory: what is not used is not read.

        Raises:
          UsageError: if the file is damaged, or cannot be read.
        """
        self.verify()
        expected = (self.num_snapshots, self.leaves[-1].columns.stop)
        with self._errors_named():
            snapshots = np.load(self.file, mmap_mode="r", allow_pickle=False)
            if snapshots.shape != expected or snapshots.dtype != np.float32:
                raise ValueError(f"it holds {snapshots.dtype} {snapshots.shape}, not float32 {expected}")
        return snapshots

    def verify(self) -> None:
        """Compares the file with its checksum: once in a process, as long as its size and time stay the same.

        Raises:
          UsageError: if the file is damaged, or cannot be read.
        """
        with self._errors_named():
            if _sha256(self.file) != self.sha256:
                raise ValueError("its checksum is not that of its record")

    @contextlib.contextmanager
    def _errors_named(self) -> Generator[None]:
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            remedy = _remedy(self.file.with_suffix(".json"))
            raise UsageError(f"{self.file} is damaged: {error}. {remedy}") from error
        except OSError as error:
            raise UsageError(f"{self.file} cannot be read: {error}.") from error


class Collection:
    """A folder of trajectories."""

    def __init__(self, folder: Path) -> None:
        """Opens a collection.

        Args:
          folder: where it is.

        Raises:
          UsageError: if the folder holds no collection, or a damaged one, or a collection of another version.
        """
        self.folder = folder
        path = folder / "manifest.json"
        if not path.exists():
            raise UsageError(f"{path} does not exist; make a collection with: wnn-jax collect")
        remedy = "Remove it and collect again with the same family: the finished runs are kept."
        self.manifest = load_json(path, remedy)
        if self.manifest.get("format") != _FORMAT:
            raise UsageError(f"{folder} holds no collection of trajectories; make one with: wnn-jax collect")
        if (version := self.manifest.get("version")) != _VERSION:
            raise UsageError(
                f"{path} has version {version}, but this wnn_jax reads version {_VERSION}. The collection was left as "
                "it is. Collect anew into another folder, or use the wnn_jax that wrote it."
            )
        self._family = check_record(path, self.manifest, _Manifest, remedy).family

    @property
    def name(self) -> str:
        """The name of the family that its runs belong to."""
        return self._family.name

    @property
    def family_key(self) -> str:
        """One hash of the family that its runs belong to."""
        return run_key(self.manifest["family"])

    @classmethod
    def create(cls, folder: Path, family: TaskFamily) -> "Collection":
        """Makes an empty collection, or opens the one that is there.

        A collection of another family in which no run was ever finished gives way.

        Args:
          folder: where the collection is to be.
          family: the family that its runs are drawn from.

        Raises:
          UsageError: if the folder has runs of another family, or a collection of another version.
        """
        path = folder / "manifest.json"
        if path.exists():
            collection = cls(folder)
            if collection._family == family:
                return collection
            if collection.finished():
                before, after = dataclasses.asdict(collection._family), dataclasses.asdict(family)
                changed = sorted(name for name, value in after.items() if before[name] != value)
                raise UsageError(
                    f"--output {folder} holds runs of another family of tasks, which differs in {', '.join(changed)}. "
                    "Collect into another folder."
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_record(path, _Manifest(_FORMAT, _VERSION, family))
        return cls(folder)

    def finished(self) -> set[int]:
        """The indices of the finished runs."""
        return {int(match[1]) for path in self.folder.iterdir() if (match := _RECORD.fullmatch(path.name))}

    def trajectories(self) -> list[Trajectory]:
        """All finished runs that did not diverge, by index, with their arrays compared with the checksums.

        Raises:
          UsageError: if a record or an array is damaged, or a group of runs is in two splits.
        """
        records = {index: self._read(index) for index in sorted(self.finished())}
        splits: dict[int, SplitName] = {}
        for index, record in records.items():
            group = index // self._family.group_size
            if splits.setdefault(group, record.split) != record.split:
                raise UsageError(
                    f"{record_file(self.folder, index)}: its split is {record.split!r}, but other runs of its group "
                    f"are {splits[group]!r}. The splits must be disjoint; collect anew."
                )
        trajectories = [self._trajectory(record) for record in records.values() if not record.diverged]
        for trajectory in trajectories:
            trajectory.verify()
        return trajectories

    def save(
        self,
        index: int,
        settings: RunSettings,
        split: SplitName,
        snapshots: Sequence[Any],
        losses: Sequence[float],
        validation: Mapping[str, float],
    ) -> None:
        """Writes a finished run: its array first, its record last, each whole or not at all.

        Args:
          index: its index in the family.
          settings: what was trained, and how.
          split: what the run is for.
          snapshots: trees of parameters.
          losses: the mean training loss before each snapshot.
          validation: metric -> score on the validation data after the last step.
        """
        trees = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in snapshots]
        array = np.stack(trees).astype(np.float32)
        with replace_on_success(self._array_file(index)) as temporary:
            with temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
            sha256 = _sha256(temporary)
        record = _Record(
            family=self.family_key,
            index=index,
            settings=settings,
            split=split,
            leaves=_leaves(snapshots[0]),
            num_snapshots=len(snapshots),
            losses=tuple(map(float, losses)),
            validation={name: float(score) for name, score in validation.items()},
            diverged=not all(np.isfinite(values).all() for values in (losses, list(validation.values()), array)),
            sha256=sha256,
        )
        write_record(record_file(self.folder, index), record)

    def _read(self, index: int) -> _Record:
        path = record_file(self.folder, index)
        remedy = _remedy(path)
        record = check_record(path, load_json(path, remedy), _Record, remedy)
        if (record.family, record.index) != (self.family_key, index):
            raise UsageError(f"{path} is of another run, or of a run of another family. {remedy}")
        return record

    def _trajectory(self, record: _Record) -> Trajectory:
        fields: dict[str, Any] = {**vars(record), "family": self.name}
        return Trajectory(**fields, file=self._array_file(record.index))

    def _array_file(self, index: int) -> Path:
        return record_file(self.folder, index).with_suffix(".npy")


def record_file(folder: Path, index: int) -> Path:
    """The record of a run of a collection, which is there when the run is finished."""
    return folder / f"run-{index:05d}.json"


def verified_trajectories(folders: Sequence[Path]) -> list[Trajectory]:
    """All finished runs of some collections that did not diverge.

    Args:
      folders: of the collections.

    Raises:
      UsageError: if two folders hold the same runs, a collection cannot be opened, or a run is damaged.
    """
    trajectories = [trajectory for folder in folders for trajectory in Collection(folder).trajectories()]
    folder_of_run: dict[tuple[str, int], Path] = {}
    for trajectory in trajectories:
        run, folder = (trajectory.family, trajectory.index), trajectory.file.parent
        if run in folder_of_run:
            raise UsageError(
                f"--collection {folder_of_run[run]} {folder}: both have run {trajectory.index} of the family "
                f"{trajectory.family!r}; name collections that share no runs."
            )
        folder_of_run[run] = folder
    return trajectories


def _leaves(params: Any) -> tuple[Leaf, ...]:
    """The tensors of a network, one behind the other."""
    roles = jax.tree.leaves(default_roles(params))
    leaves: list[Leaf] = []
    start = 0
    for (path, array), role in zip(jax.tree_util.tree_leaves_with_path(params), roles, strict=True):
        leaves.append(Leaf(jax.tree_util.keystr(path, simple=True, separator="/"), role, array.shape, start))
        start = leaves[-1].columns.stop
    return tuple(leaves)


def _remedy(record: Path) -> str:
    return f"Remove its record, {record}, and collect again: only this run is repeated."


def _sha256(file: Path) -> str:
    status = file.stat()
    return _sha256_of_state(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_of_state(file: Path, size: int, modified_ns: int) -> str:
    """The checksum of a file, computed once in a process for what is known of its content."""
    del size, modified_ns
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
