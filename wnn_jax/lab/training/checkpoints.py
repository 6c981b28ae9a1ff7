"""Checkpoints that a run resumes from, bit for bit."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._files import read_arrays, write_arrays
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.step import TrainState

_LOGGER = logging.getLogger(__name__)
_NUM_KEPT = 2
_FORMAT, _VERSION = "wnn_jax.checkpoint", 1


class Checkpoints:
    """The last two checkpoints of a run, one file each: where one is damaged, the run goes on from the other.

    The first checkpoint makes the folder. `None` keeps no checkpoints. `seconds_between` is the least time between two.
    """

    def __init__(self, folder: Path | None, seconds_between: float) -> None:
        self._folder, self._seconds_between, self._last = folder, seconds_between, time.monotonic()

    def restore(self, state: TrainState, log: Any) -> tuple[TrainState, Any]:
        """Return the latest checkpoint that is not damaged, or the arguments where there is no checkpoint.

        `state` has the structure of the checkpoint's state. If all checkpoints are damaged, it is a `UsageError`.
        """
        damage: list[UsageError] = []
        for file in self._files():
            try:
                restored = load_state(file, state)
            except UsageError as error:
                damage.append(error)
                continue
            for error in damage:
                _LOGGER.warning("%s The run goes on from the checkpoint before, of step %s.", error, file.name)
            return restored
        if damage:
            raise UsageError(f"{damage[0]} Remove {self._folder}: what this run did in its stage is done again.")
        return state, log

    def save(self, step: int, state: TrainState, log: Any, *, now: bool = False) -> None:
        """Save a checkpoint, if the last one is long enough ago, or `now`. A failure keeps the checkpoints before."""
        if self._folder is None or not (now or time.monotonic() - self._last >= self._seconds_between):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        save_state(self._folder / str(step), state, log)
        for file in self._files()[_NUM_KEPT:]:
            file.unlink(missing_ok=True)
        self._last = time.monotonic()

    def _files(self) -> list[Path]:
        """Return the files, the latest first. Their names are the steps."""
        if self._folder is None or not self._folder.is_dir():
            return []
        files = [file for file in self._folder.iterdir() if file.name.isdigit()]
        return sorted(files, key=lambda file: int(file.name), reverse=True)


def save_state(file: Path, state: Any, log: Any) -> None:
    """Write a tree of arrays, and a log in types that JSON has, whole or not at all."""
    leaves = {str(index): np.asarray(_numbers(leaf)) for index, leaf in enumerate(jax.tree.leaves(state))}
    write_arrays(file, leaves, {"format": _FORMAT, "version": _VERSION, "log": json.dumps(log)})


def load_state(file: Path, state: Any) -> tuple[Any, Any]:
    """Read a tree and a log that `save_state` wrote. A damaged file, or another tree, is a `UsageError`.

    `state` is a tree of the same structure. The arrays are placed on its devices.
    """
    try:
        header, arrays = read_arrays(file, format_name=_FORMAT, version=_VERSION, remedy="")
    except (OSError, ValueError) as error:
        raise UsageError(str(error).strip()) from error
    leaves, treedef = jax.tree.flatten(state)
    expected = {str(index): _type(_numbers(leaf)) for index, leaf in enumerate(leaves)}
    if {name: _type(array) for name, array in arrays.items()} != expected:
        raise UsageError(f"{file} is damaged: it holds arrays of other shapes or types than this run has.")
    restored = [_like(arrays[str(index)], leaf) for index, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, restored), json.loads(header["log"])


def _numbers(leaf: Any) -> Any:
    """Return the data of a random key, or any other leaf itself."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(array: Any, leaf: Any) -> Any:
    """Return the array as the kind of leaf, and on the devices, that `leaf` has."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else array


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _type(array: Any) -> tuple[Any, ...]:
    return array.shape, np.dtype(array.dtype)
