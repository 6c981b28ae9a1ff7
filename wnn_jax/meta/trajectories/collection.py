"""Trajectories, the weights of training runs over time, on disk.

A collection is a folder with `manifest.json`, which says how its runs were drawn, and two files per finished run:
`run-00042.npy`, its snapshots as one float32 array `[num_snapshots, num_weights]` (NumPy's own format, which can be
read in parts without loading the rest), and `run-00042.json`, its record: what was trained, the split that the run
belongs to, the name, role, shape and first column of every tensor, the training losses, the scores on validation data
after the last step, whether the run diverged, and the checksum of the array. Weights are kept in full: a forecast is
made from differences between snapshots, which half precision would drown late in training.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wnn_jax._files import replace_on_success
from wnn_jax._roles import default_roles
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks.families import RunSettings, SplitName, TaskFamily

_FORMAT = "wnn_jax.trajectories"
_VERSION = 2
_RECORD = re.compile(r"run-(\d{5,})\.json")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a network.

    Attributes:
      name: its path.
      role: its role.
      shape: its shape.
      start: the column of its first weight.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    start: int

    @property
    def columns(self) -> slice:
        """Its columns in the array of snapshots."""
        return slice(self.start, self.start + int(np.prod(self.shape, dtype=int)))


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
          UsageError: if the file is missing, truncated or of another shape.
        """
        expected = (self.num_snapshots, self.leaves[-1].columns.stop)
        try:
            snapshots = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(
                f"{self.file} is missing or truncated ({error}). Remove its record, {self.file.with_suffix('.json')}, "
                "and collect again: only this run is repeated."
            ) from error
        if snapshots.shape != expected or snapshots.dtype != np.float32:
            raise UsageError(f"{self.file} holds {snapshots.dtype} {snapshots.shape}, not float32 {expected}.")
        return snapshots

    def verify(self) -> None:
        """Compares the file with its checksum.

        Raises:
          UsageError: if it is damaged.
        """
        if not self.file.exists() or _sha256(self.file) != self.sha256:
            raise UsageError(
                f"{self.file} is damaged: its checksum is not that of its record. Remove its record, "
                f"{self.file.with_suffix('.json')}, and collect again: only this run is repeated."
            )


class Collection:
    """A folder of trajectories."""

    def __init__(self, folder: Path) -> None:
        """Opens a collection.

        Args:
          folder: where it is.

        Raises:
          UsageError: if the folder holds no collection, or a collection of another version.
        """
        self.folder = folder
        self.manifest = _read_json(folder / "manifest.json")
        if self.manifest.get("format") != _FORMAT:
            raise UsageError(
                f"{folder} holds no collection of trajectories; make one with: python -m wnn_jax.meta collect"
            )
        if self.manifest["version"] != _VERSION:
            raise UsageError(
                f"{folder}/manifest.json has version {self.manifest.get('version')}, but this wnn_jax reads version "
                f"{_VERSION}. The collection was left as it is. Collect anew into another folder, or use the wnn_jax "
                "that wrote it."
            )

    @property
    def name(self) -> str:
        """The name of the family that its runs belong to."""
        return self.manifest["family"]["name"]

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
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(family)))
        manifest = {"format": _FORMAT, "version": _VERSION, "family": settings}
        path = folder / "manifest.json"
        if path.exists():
            collection = cls(folder)
            if collection.manifest == manifest:
                return collection
            if collection.finished():
                before = collection.manifest["family"]
                changed = sorted(name for name in {**settings, **before} if before.get(name) != settings.get(name))
                raise UsageError(
                    f"--output {folder} holds runs of another family of tasks, which differs in {', '.join(changed)}. "
                    "Collect into another folder."
                )
        folder.mkdir(parents=True, exist_ok=True)
        with replace_on_success(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        return cls(folder)

    def finished(self) -> set[int]:
        """The indices of the finished runs."""
        return {int(match[1]) for path in self.folder.iterdir() if (match := _RECORD.fullmatch(path.name))}

    def trajectories(self) -> list[Trajectory]:
        """All finished runs that did not diverge, by index. Their arrays are not read; see `verified_trajectories`.

        Raises:
          UsageError: if a record is damaged, or a group of runs is in two splits.
        """
        trajectories = [self._read(index) for index in sorted(self.finished())]
        group_size = self.manifest["family"]["group_size"]
        splits: dict[int, SplitName] = {}
        for trajectory in trajectories:
            group = trajectory.index // group_size
            if splits.setdefault(group, trajectory.split) != trajectory.split:
                raise UsageError(
                    f"{trajectory.file.with_suffix('.json')}: its split is {trajectory.split!r}, but other runs of its "
                    f"group are {splits[group]!r}. The splits must be disjoint; collect anew."
                )
        return [trajectory for trajectory in trajectories if not trajectory.diverged]

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
        leaves = _leaves(snapshots[0])
        trees = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in snapshots]
        array = np.stack(trees).astype(np.float32)
        file = self._file(index)
        with replace_on_success(file) as temporary:
            with temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
            sha256 = _sha256(temporary)
        is_finite = all(np.isfinite(values).all() for values in (losses, list(validation.values()), array))
        record = {
            "settings": dataclasses.asdict(settings),
            "split": split,
            "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
            "num_snapshots": len(snapshots),
            "losses": [_to_json(loss) for loss in losses],
            "validation": {name: _to_json(score) for name, score in validation.items()},
            "diverged": not is_finite,
            "sha256": sha256,
        }
        with replace_on_success(file.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, allow_nan=False) + "\n")

    def _read(self, index: int) -> Trajectory:
        file = self._file(index)
        record = _read_json(file.with_suffix(".json"))
        try:
            return Trajectory(
                family=self.name,
                index=index,
                settings=RunSettings(**record["settings"]),
                split=record["split"],
                leaves=tuple(
                    Leaf(leaf["name"], leaf["role"], tuple(leaf["shape"]), leaf["start"]) for leaf in record["leaves"]
                ),
                num_snapshots=record["num_snapshots"],
                losses=tuple(map(_from_json, record["losses"])),
                validation={name: _from_json(score) for name, score in record["validation"].items()},
                diverged=record["diverged"],
                file=file,
                sha256=record["sha256"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{file.with_suffix('.json')} is damaged ({error!r}). Remove it and collect again: only this run is "
                "repeated."
            ) from error

    def _file(self, index: int) -> Path:
        return self.folder / f"run-{index:05d}.npy"


def verified_trajectories(folders: Sequence[Path]) -> list[Trajectory]:
    """All finished runs of some collections that did not diverge, each compared with its checksum.

    Args:
      folders: of the collections.

    Raises:
      UsageError: if two folders hold the same runs, a collection cannot be opened, or the array of a run is damaged.
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
        trajectory.verify()
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


def _to_json(value: float) -> float | None:
    """The value, or `None` where JSON has no name for it."""
    return float(value) if np.isfinite(value) else None


def _from_json(value: float | None) -> float:
    return float("nan") if value is None else value


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; make a collection with: python -m wnn_jax.meta collect") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object.")
    return content


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
