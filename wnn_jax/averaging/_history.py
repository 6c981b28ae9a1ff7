"""Checkpoints of one training run, to be averaged."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_float_dtype, check_int


class WeightHistory:
    """Collect parameters along a training run, in memory or on disk with Orbax.

    Call it from a training loop on the host. For an average in the optimizer's state, see `uniform`, `lawa` and `ema`.

    Args:
      period: steps between checkpoints.
      size: how many of the latest to keep; `None` for all.
      start_step: the first step that counts. Steps are numbered from 0: checkpoints are those after step
        `start_step + period - 1`, `start_step + 2 period - 1`, ...
      dtype: a floating-point dtype to keep them in; `None` for the dtype of the parameters.
      folder: where to keep them, as Orbax checkpoints, which any other program may have written. Checkpoints that are
        there already count. `None` for memory. Needs `orbax-checkpoint`.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from wnn_jax.averaging import WeightHistory
      >>> history = WeightHistory(period=10, size=2)
      >>> for step in range(40):
      ...     _ = history.update(step, {"w": jnp.array(float(step))})
      >>> [checkpoint["w"].item() for checkpoint in history]
      [29.0, 39.0]
    """

    def __init__(
        self,
        *,
        period: int,
        size: int | None = None,
        start_step: int = 0,
        dtype: Any = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._period = check_int("period", period, "the number of steps between checkpoints", minimum=1)
        if size is not None:
            size = check_int("size", size, "how many of the latest checkpoints to keep, or None for all", minimum=1)
        self._start_step = check_int("start_step", start_step, "the first step that counts", minimum=0)
        if dtype is not None:
            check_float_dtype("dtype", dtype, "what to keep checkpoints in, or None for that of the parameters")
        self._size, self._dtype = size, dtype
        self._in_memory: dict[int, Any] = {}
        self._manager: Any = None
        if folder is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=size, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
            self._args = ocp.args

    @property
    def steps(self) -> list[int]:
        """The steps after which the kept checkpoints were taken, in ascending order."""
        return sorted(self._in_memory if self._manager is None else self._manager.all_steps())

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        """Yield the checkpoints, oldest first; from disk one at a time."""
        for step in self.steps:
            is_here = self._manager is None
            yield self._in_memory[step] if is_here else self._manager.restore(step, args=self._args.StandardRestore())

    def update(self, step: int, params: Any) -> bool:
        """Take a checkpoint if one is due, and return whether it was.

        Args:
          step: the number of the step just taken.
          params: the parameters after it.
        """
        since = step - self._start_step
        if since < 0 or since % self._period != self._period - 1:
            return False
        checkpoint = jax.tree.map(lambda leaf: jnp.array(leaf, self._dtype or leaf.dtype), params)
        if self._manager is None:
            self._in_memory[step] = checkpoint
            while self._size is not None and len(self._in_memory) > self._size:
                del self._in_memory[min(self._in_memory)]
        elif step not in self._manager.all_steps():
            self._manager.save(step, args=self._args.StandardSave(checkpoint))
        return True

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._manager is not None:
            self._manager.close()
