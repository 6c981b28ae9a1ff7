"""Results of runs on disk: one file each, found by the key of what made it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Task
from wnn_jax.lab.training.keys import describe_differences, describe_method, environment, run_key, versions
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.trainer import Evaluation, Fitted, Scores, weights_sha256

_FORMAT = "wnn_jax.result"
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      description: what made it: task, method, learning rate, seed, numbers of steps, versions.
      evaluations: on the validation split, in the order of steps.
      test: reading -> metric -> value on the test split, at the end.
      diverged: whether the run ended early because its loss was no longer finite.
    """

    description: Mapping[str, Any]
    evaluations: Sequence[Evaluation]
    test: Scores
    diverged: bool

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
        """Reading -> value of a metric at the end, NaN where the run diverged."""
        scores = self.evaluations[-1].scores
        return {name: math.nan if self.diverged else values[metric] for name, values in scores.items()}


def describe_run(
    task: Task,
    method: Method,
    *,
    task_description: Mapping[str, Any],
    learning_rate: float,
    num_steps: int,
    evaluate_every: int,
) -> dict[str, Any]:
    """What makes a result, but for the seed.

    Args:
      task: what is trained.
      method: how.
      task_description: of `describe_task`.
      learning_rate: given to the method.
      num_steps: length of the run.
      evaluate_every: steps between evaluations.
    """
    return {
        "task": dict(task_description),
        "method": describe_method(method, task, learning_rate, num_steps),
        "learning_rate": learning_rate,
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "versions": versions(),
    }


def result_file(folder: Path, description: Mapping[str, Any]) -> Path:
    """Where the result of a run is kept."""
    name = f"{description['method']['name']}-rate{description['learning_rate']:g}-seed{description['seed']}"
    return folder / f"{name.replace('/', '_')}-{run_key(description)[:12]}.json"


def save_result(path: Path, description: Mapping[str, Any], fitted: Fitted) -> None:
    """Writes a result, whole or not at all."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "key": run_key(description),
        "description": description,
        "diverged": fitted.diverged,
        "test": fitted.test,
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in fitted.evaluations],
        "weights_sha256": weights_sha256(fitted.state.params),
        "environment": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(path) as temporary:
        # JSON has no name for NaN.
        temporary.write_text(json.dumps(_without_nan(content), allow_nan=False) + "\n")


def load_result(path: Path) -> tuple[str, Result]:
    """Reads a result.

    Returns:
      Its key, and the result.

    Raises:
      UsageError: if the file is damaged, or of another version.
    """
    try:
        content = json.loads(path.read_text())
        is_result = content.get("format") == _FORMAT
        version = content.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, and only this run is repeated.") from error
    if not is_result and "method" not in content:
        raise UsageError(f"{path} is no result of a comparison; move it elsewhere, or choose another --output.")
    if not is_result or version != _VERSION:
        raise UsageError(
            f"{path} is a result of version {version if is_result else 1}, but this wnn_jax reads version {_VERSION}. "
            "It is kept as it is; choose another --output."
        )
    try:
        evaluations = [Evaluation(**_with_nan(evaluation)) for evaluation in content["evaluations"]]
        result = Result(content["description"], evaluations, _with_nan(content["test"]), content["diverged"])
        if run_key(result.description) != content["key"] or not evaluations:
            raise ValueError("its key is not that of its description")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); remove it, and only this run is repeated.") from error
    return content["key"], result


def load_results(folder: Path, planned: Sequence[Mapping[str, Any]]) -> tuple[list[Result], list[str]]:
    """The results of planned runs, in the order of the plan, and what else there is of the same runs.

    Args:
      folder: where results are.
      planned: the descriptions of runs.

    Returns:
      The results that are there, and a line for every file that is of one of these methods, rates and seeds but was made
      by something else: which file, and what is different.

    Raises:
      UsageError: if a file is damaged, or of another version.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    by_key = {run_key(description): description for description in planned}
    by_place = {_place(description): description for description in planned}
    results, stale = {}, []
    for file in files:
        key, result = load_result(file)
        if key in by_key:
            results[key] = result
        elif (description := by_place.get(_place(result.description))) is not None:
            differences = describe_differences(result.description, description)
            stale.append(f"{file.name} was made by something else and is not shown: {'; '.join(differences)}")
    return [results[key] for key in by_key if key in results], stale


def refuse_old_folder(folder: Path) -> None:
    """Refuses a folder with results of the first version, which had no keys.

    Raises:
      UsageError: if it is one.
    """
    if (folder / "settings.json").exists():
        raise UsageError(
            f"--output {folder} holds results of version 1, but this wnn_jax reads version {_VERSION}. They are kept "
            "as they are; choose another --output."
        )


def _place(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a reader of a table would take two runs for the same by."""
    return description["method"]["name"], description["learning_rate"], description["seed"]


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value
