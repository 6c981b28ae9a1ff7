"""One run of a comparison, as a job for a worker."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wnn_jax.lab.comparing.results import Result, add_result, has_result
from wnn_jax.lab.tasks import Task
from wnn_jax.lab.training.keys import made_by, run_key
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.trainer import Trainer, weights_sha256


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a comparison, with all that a worker needs to make it."""

    make_task: Callable[[], Task]
    method: Method
    description: Mapping[str, Any]
    folder: Path
    """The folder of the results."""
    checkpoint_seconds: float

    @property
    def key(self) -> str:
        """The key of its result."""
        return run_key(self.description)

    @property
    def file(self) -> Path:
        """The folder of its checkpoints. Its lock file is next to it."""
        return self.folder / "checkpoints" / self.key[:12]

    def is_done(self) -> bool:
        """Return whether the result exists."""
        return has_result(self.folder, self.key)


def train_run(run: Run) -> None:
    """Make the result of a run, and remove its checkpoints."""
    trainer = _trainer(run)
    fitted = trainer.fit(run.description["seed"], run.file, checkpoint_seconds=run.checkpoint_seconds)
    result = Result(
        run.description,
        tuple(trainer.task.metrics),
        fitted.evaluations,
        fitted.test,
        fitted.diverged,
        made_by=made_by(),
        weights_sha256=weights_sha256(fitted.state.params),
    )
    add_result(run.folder, result)
    shutil.rmtree(run.file, ignore_errors=True)


# One per method and learning rate in every process, so that all seeds share a compiled program.
_TRAINERS: dict[str, Trainer] = {}
_MAX_TRAINERS = 32


def _trainer(run: Run) -> Trainer:
    key = run_key({name: value for name, value in run.description.items() if name != "seed"})
    if key not in _TRAINERS:
        while len(_TRAINERS) >= _MAX_TRAINERS:
            _TRAINERS.pop(next(iter(_TRAINERS)))
        settings = {name: run.description[name] for name in ("learning_rate", "num_steps", "evaluate_every")}
        _TRAINERS[key] = Trainer(run.make_task(), run.method, **settings)
    return _TRAINERS[key]
