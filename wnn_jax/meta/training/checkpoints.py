"""Checkpoints of a run, from which it goes on bit for bit."""

import time
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from wnn_jax.meta.training.step import TrainState


class Checkpoints:
    """The latest checkpoint of a run, in a folder; an interruption leaves the one before.

    Args:
      folder: where it is; `None` to keep none.
      seconds_between: the shortest time between two of them.
    """

    def __init__(self, folder: Path | None, seconds_between: float) -> None:
        self._seconds_between = seconds_between
        self._last = time.monotonic()
        self._manager = None
        if folder is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def restore(self, state: TrainState, log: Any) -> tuple[TrainState, Any]:
        """The latest checkpoint, or what was given where there is none.

        Args:
          state: of the same structure as that of the checkpoint.
          log: what is known of the run, of what JSON has.
        """
        if self._manager is None or (latest := self._manager.latest_step()) is None:
            return state, log
        restored = self._manager.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.eval_shape(lambda: state)), log=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["log"]["log"]

    def save(self, step: int, state: TrainState, log: Any, *, now: bool = False) -> None:
        """Saves a checkpoint, if the last one is long enough ago, or `now`."""
        if self._manager is None or not (now or time.monotonic() - self._last >= self._seconds_between):
            return
        items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "log": ocp.args.JsonSave({"log": log})}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._last = time.monotonic()
