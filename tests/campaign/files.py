"""Files that were damaged, or made up.

Held: whatever is done to the file of a nowcaster, or to a file of a collection of trajectories, reading gives what was
written, or ends in the one kind of error that is promised, which names the file. Nothing is warned of, and no more
memory is taken than a few times the size of the files, whatever they declare. A file that was changed and given the
right checksum may also be read as what it says: as a nowcaster that is saved as just that, with finite weights.
"""

import dataclasses
import functools
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import wnn_jax
from tests.campaign.damage import REWRITES, REWRITES_OF_BYTES, Archive, choose
from tests.campaign.part import Part, Verdict
from tests.helpers import random_leaves
from tests.lab.conftest import tiny_family
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Collection, verified_trajectories
from wnn_jax.nowcasters import (
    WNN,
    AdaptiveLinear,
    CurveFit,
    Drift,
    LearnedDrift,
    WNNPlus,
    _multi_horizon,
    learned_drift,
    wnn,
)

_RECORD = {"steps": 20, "loss": 0.125, "tasks": ["one", "another"], "scores": {"mine@0.5": {"saved": -0.5}}}
_NUM_RUNS = 3
# Reading may take so many times the size of the files, and so many bytes for what it reads of the library itself.
_MULTIPLE = 12
_BYTES = 2**22


class Subject(NamedTuple):
    """What is written and read.

    Attributes:
      files: what was written, by name.
      read: reads the files in a folder.
      error: what reading damaged ones ends in.
      differs: says how what was read differs from what the changed files, with right checksums, say.
    """

    files: Mapping[str, bytes]
    read: Callable[[Path], Any]
    error: type[ValueError]
    differs: Callable[[Path], str | None]


def check(rng: np.random.Generator, folder: Path) -> Verdict:
    """Draws a subject, one of its files and what is done to it."""
    subjects = _collections() if rng.random() < 0.3 else _nowcasters()
    name, other = (choose(rng, sorted(subjects)) for _ in range(2))
    subject = subjects[name]
    file = choose(rng, sorted(subject.files))
    rewrites = REWRITES_OF_BYTES if rng.random() < 0.5 else REWRITES[Path(file).suffix]
    how = choose(rng, sorted(rewrites))
    change = rewrites[how](rng, subject.files[file], choose(rng, sorted(subjects[other].files.values())))
    for path, content in {**subject.files, file: change.content}.items():
        (folder / path).write_bytes(content)
    outcome, failure = _judge(name, subject, folder, change.has_checksum)
    return Verdict({f"{name}: {outcome}": 1}, (f"{name}, {file}, {how}: {failure}",) if failure else ())


def _judge(name: str, subject: Subject, folder: Path, has_checksum: bool) -> tuple[str, str | None]:
    """What reading came to, and what is wrong with that."""
    most = _BYTES + _MULTIPLE * sum(path.stat().st_size for path in folder.iterdir())
    tracemalloc.start()
    try:
        content = subject.read(folder)
        _, peak = tracemalloc.get_traced_memory()
    except subject.error as error:
        _, peak = tracemalloc.get_traced_memory()
        outcome = "refused", None if str(folder) in str(error) else f"the error names no file: {error}"
    except Exception as error:
        return "failed", f"{type(error).__name__} instead of {subject.error.__name__}: {error}"
    else:
        is_same = content == _written(name)
        if has_checksum:
            outcome = "the same" if is_same else "as it was changed", subject.differs(folder)
        else:
            outcome = ("the same", None) if is_same else ("another", "it was read as something else")
    finally:
        tracemalloc.stop()
    return outcome if peak < most else ("too large", f"reading took {peak:,} bytes, more than {most:,}")


# What is written


@functools.cache
def _nowcasters() -> Mapping[str, Subject]:
    plus, linear = (
        random_leaves(_multi_horizon._init_shapes(cls.network_class(width=3, num_hidden=1, num_horizons=8)), seed)
        for seed, cls in enumerate((WNNPlus, AdaptiveLinear))
    )
    network = random_leaves(jax.eval_shape(wnn._init_network, jax.random.key(0)), 2)
    drift = random_leaves(learned_drift._init_shapes(learned_drift._network(3, num_means=2)), 3)
    nowcasters = (
        CurveFit("sigmoid", chunk_size=100),
        Drift(gain=0.04, max_rows=None),
        WNNPlus(plus, default_horizon=7, record=_RECORD),
        AdaptiveLinear(linear, chunk_size=64, record=_RECORD),
        WNN({"norm": network}, published_bias=True, record=_RECORD),
        LearnedDrift(drift, {"gain": 0.01}, num_means=2, record=_RECORD),
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {type(nowcaster).__name__: _saved(nowcaster, Path(folder)) for nowcaster in nowcasters}
    return {
        name: Subject({_FILE: content}, _read_nowcaster, ValueError, _nowcaster_differs)
        for name, content in files.items()
    }


@functools.cache
def _collections() -> Mapping[str, Subject]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        collection = Collection.create(Path(folder), tiny_family())
        for index in range(_NUM_RUNS):
            shapes = {"kernel": (3, 4), "bias": (4,)}
            snapshots = [{"Dense_0": {name: rng.normal(size=shapes[name]) for name in shapes}} for _ in range(5)]
            settings, split = tiny_family().settings(index), tiny_family().split(index)
            collection.save(index, settings, split, snapshots, rng.random(5).tolist(), {"loss": 0.5, "accuracy": 0.75})
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {"Collection": Subject(files, _read_collection, UsageError, _collection_differs)}


@functools.cache
def _written(name: str) -> Any:
    subject = {**_nowcasters(), **_collections()}[name]
    with tempfile.TemporaryDirectory() as folder:
        for file, content in subject.files.items():
            (Path(folder) / file).write_bytes(content)
        return subject.read(Path(folder))


_FILE = "nowcaster.npz"


def _saved(nowcaster: Any, folder: Path) -> bytes:
    wnn_jax.save(nowcaster, folder / "saved.npz")
    return (folder / "saved.npz").read_bytes()


def _read_nowcaster(folder: Path) -> Any:
    nowcaster: Any = wnn_jax.load(folder / _FILE)
    return fingerprint(nowcaster), repr(getattr(nowcaster, "record", None))


def _read_collection(folder: Path) -> Any:
    trajectories = verified_trajectories([folder])
    snapshots = [(array.shape, array.dtype, array.tobytes()) for array in (run.snapshots for run in trajectories)]
    return repr([dataclasses.replace(run, file=Path(run.file.name)) for run in trajectories]), snapshots


def _nowcaster_differs(folder: Path) -> str | None:
    before = Archive.read((folder / _FILE).read_bytes())
    after = Archive.read(_saved(wnn_jax.load(folder / _FILE), folder))
    if not all(np.isfinite(array).all() for array in after.arrays().values()):
        return "it has weights that are not finite"
    if _comparable(before.arrays()) != _comparable(after.arrays()):
        return "it has other weights"
    # What the file does not say is what it is by default.
    changed, actual = ({**archive.metadata(), "sha256": None} for archive in (before, after))
    common = {name: value for name, value in changed.items() if name in actual}
    return None if _is_part(common, actual) and common.keys() == actual.keys() else f"it is {actual}, not {common}"


def _collection_differs(folder: Path) -> str | None:
    for run in verified_trajectories([folder]):
        if not np.isfinite([*run.losses, *run.validation.values(), run.settings.learning_rate]).all():
            return "it has figures that are not finite"
        if any(run.snapshots[:, leaf.columns].shape[1] != np.prod(leaf.shape) for leaf in run.leaves):
            return "it has leaves outside its snapshots"
    return None


def _comparable(arrays: Mapping[str, np.ndarray]) -> Any:
    return {name: (array.shape, array.dtype.name, array.tobytes()) for name, array in arrays.items()}


def _is_part(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and _is_part(value, whole[name]) for name, value in part.items())
    return part == whole


PART = Part(num_cases=10_000, num_tested=100, check=check)
