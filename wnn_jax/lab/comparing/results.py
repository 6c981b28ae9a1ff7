"""Results of runs: one compressed file for all runs of a comparison."""

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.keys import RESULTS_VERSION, run_key
from wnn_jax.lab.training.trainer import Evaluation, Scores

RUNS_FILE = "runs.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    description: Mapping[str, Any]
    """The configuration: task, method, learning rate, seed, steps. Its hash is the key of the run."""
    metrics: tuple[Metric, ...]
    """The metrics of the task, the target first."""
    evaluations: Sequence[Evaluation]
    test: Scores
    """The scores on the test split, at the end."""
    diverged: bool = False
    """Whether the run ended early because its loss was no longer finite."""
    version: int = RESULTS_VERSION
    """The `RESULTS_VERSION` that it was made with."""
    made_by: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """The code, the package versions and the machine."""
    weights_sha256: str = ""
    """A hash of the last weights."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.description["method"]["name"]

    @property
    def learning_rate(self) -> float:
        """The learning rate."""
        return self.description["learning_rate"]

    @property
    def seed(self) -> int:
        """The seed."""
        return self.description["seed"]

    def final(self, metric: str) -> dict[str, float]:
        """Map the name of evaluation weights to a metric at the end, NaN where the run diverged."""
        scores = self.evaluations[-1].scores
        return {name: math.nan if self.diverged else values[metric] for name, values in scores.items()}


def load_results(folder: Path) -> list[Result]:
    """Read all results in a folder, oldest first. A damaged file or an older format is a `UsageError`."""
    file = folder / RUNS_FILE
    if (folder / "runs").is_dir() and any((folder / "runs").glob("*.json")):
        raise UsageError(
            f"{folder / 'runs'} holds results of wnn_jax 0.1, one JSON file per run; read them with that version, or "
            "choose another --output."
        )
    if not file.exists():
        return []
    try:
        with gzip.open(file, "rt") as lines:
            results = [_from_json(json.loads(line)) for line in lines]
        if not results:
            raise ValueError("it holds no run")
        return results
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is damaged ({error!r}). Restore it from a copy, or remove it: its runs are then made again."
        ) from error


def has_result(folder: Path, key: str) -> bool:
    """Return whether the file of a folder has a result with this key."""
    file = folder / RUNS_FILE
    if not file.exists():
        return False
    with gzip.open(file, "rt") as lines:
        return any(line.startswith(f'{{"key": "{key}"') for line in lines)


def add_result(folder: Path, result: Result) -> None:
    """Append a result to the file of a folder. The file is written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file, line = folder / RUNS_FILE, json.dumps(_to_json(result), allow_nan=False) + "\n"
    with filelock.FileLock(folder / f".{RUNS_FILE}.lock"):
        before = file.read_bytes() if file.exists() else b""
        with replace_on_success(file) as temporary:
            temporary.write_bytes(before + gzip.compress(line.encode(), mtime=0))


def _to_json(result: Result) -> dict[str, Any]:
    content = dataclasses.asdict(result)
    for metric in content["metrics"]:
        del metric["from_mean"]
    return {"key": run_key(result.description, result.version), **_without_nan(content)}


def _from_json(content: dict[str, Any]) -> Result:
    if run_key(content["description"], content["version"]) != content.pop("key"):
        raise ValueError("a key does not belong to its description")
    content["metrics"] = tuple(Metric(**metric) for metric in content["metrics"])
    content["evaluations"] = [Evaluation(**_with_nan(evaluation)) for evaluation in content["evaluations"]]
    if not content["evaluations"]:
        raise ValueError("a run has no evaluation")
    content["test"] = _with_nan(content["test"])
    return Result(**content)


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON does not have by `None`."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value
