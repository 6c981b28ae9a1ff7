"""Checkpoints of one training, to be averaged."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_float_dtype, check_int


class WeightHistory:
    """Collects parameters along a training: in memory, or on disk with Orbax.

    It is an ordinary object, to be called from a training loop on the host. Averages that live in the state of the
    optimizer, under `jit`, are `uniform`, `lawa` and `ema`.

    Args:
      period: steps between checkpoints.
      size: how many of the latest to keep; `None` for all.
      start_step: the first step that counts. Steps are numbered from 0: taken are those after step
        `start_step + period - 1`, `start_step + 2 period - 1`, ...
      dtype: a floating-point dtype to keep them in; `None` for that of the parameters.
      folder: where to keep them, as Orbax checkpoints that any other run can read too. What is there already counts.
        `None`: in memory. Needs `orbax-checkpoint`.

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
        period = check_int("period", period, "the number of steps between checkpoints", minimum=1)
        if size is not None:
            size = check_int("size", size, "how many of the latest checkpoints to keep, or None for all", minimum=1)
        start_step = check_int("start_step", start_step, "the first step that counts", minimum=0)
        if dtype is not None:
            check_float_dtype("dtype", dtype, "what to keep checkpoints in, or None for that of the parameters")
        self._period = period
        self._size = size
        self._start_step = start_step
        self._dtype = dtype
        self._in_memory: dict[int, Any] = {}
        self._manager: Any = None
        if folder is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=size, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        """The steps after which the kept checkpoints were taken, in their order."""
        return sorted(self._in_memory if self._manager is None else self._manager.all_steps())

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        """The checkpoints, oldest first; those on disk are read one at a time."""
        for step in self.steps:
            yield self._in_memory[step] if self._manager is None else self._restore(step)

    def update(self, step: int, params: Any) -> bool:
        """Takes a checkpoint, if it is time.

        Args:
          step: the number of the step just taken.
          params: the parameters after it.

        Returns:
          Whether it was time.
        """
        since = step - self._start_step
        if since < 0 or since % self._period != self._period - 1:
            return False
        kept = jax.tree.map(lambda leaf: jnp.array(leaf, self._dtype or leaf.dtype), params)
        if self._manager is None:
            self._in_memory[step] = kept
            while self._size is not None and len(self._in_memory) > self._size:
                del self._in_memory[min(self._in_memory)]
        elif step not in self._manager.all_steps():
            import orbax.checkpoint as ocp

            self._manager.save(step, args=ocp.args.StandardSave(kept))
        return True

    def close(self) -> None:
        """Waits for what is being written."""
        if self._manager is not None:
            self._manager.close()

    def _restore(self, step: int) -> Any:
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.StandardRestore())
