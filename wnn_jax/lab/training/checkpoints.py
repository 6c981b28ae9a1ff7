"""Checkpoints of a run, from which it goes on bit for bit."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.step import TrainState

_LOGGER = logging.getLogger(__name__)
_NUM_KEPT = 2
_DIGEST_SIZE = hashlib.sha256().digest_size


class Checkpoints:
    """The last two checkpoints of a run, each a file of a folder: where one is damaged there is the one before.

    Args:
      folder: where they are, made with the first one; `None` to keep none.
      seconds_between: the shortest time between two of them.
    """

    def __init__(self, folder: Path | None, seconds_between: float) -> None:
        self._folder = folder
        self._seconds_between = seconds_between
        self._last = time.monotonic()

    def restore(self, state: TrainState, log: Any) -> tuple[TrainState, Any]:
        """The latest checkpoint that is not damaged, or what was given where there is none.

        Args:
          state: of the same structure as that of the checkpoint.
          log: what is known of the run, of what JSON has.

        Raises:
          UsageError: if all of them are damaged.
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
        """Saves a checkpoint, if the last one is long enough ago, or `now`.

        Raises:
          OSError: if it cannot be written; those before are kept.
        """
        if self._folder is None or not (now or time.monotonic() - self._last >= self._seconds_between):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        save_state(self._folder / str(step), state, log)
        for file in self._files()[_NUM_KEPT:]:
            file.unlink(missing_ok=True)
        self._last = time.monotonic()

    def _files(self) -> list[Path]:
        """The latest first. Their names are the steps."""
        if self._folder is None or not self._folder.is_dir():
            return []
        files = [file for file in self._folder.iterdir() if file.name.isdigit()]
        return sorted(files, key=lambda file: int(file.name), reverse=True)


def save_state(file: Path, state: Any, log: Any) -> None:
    """Writes a tree of arrays and a log, whole or not at all, behind a checksum of all this.

    Args:
      file: where to.
      state: the tree.
      log: of what JSON has.
    """
    leaves = {str(index): np.asarray(_data(leaf)) for index, leaf in enumerate(jax.tree.leaves(state))}
    content = serialization.msgpack_serialize({"leaves": leaves, "log": json.dumps(log)})
    with replace_on_success(file) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


def load_state(file: Path, state: Any) -> tuple[Any, Any]:
    """Reads what `save_state` wrote.

    Args:
      file: where from.
      state: a tree of the same structure, whose arrays are where those that are read are to be.

    Returns:
      The tree, and the log.

    Raises:
      UsageError: if the file is damaged, or holds another tree.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    digest, content = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise UsageError(f"{file} is damaged: its checksum is not that of its content.")
    restored: Any = serialization.msgpack_restore(content)
    leaves, treedef = jax.tree.flatten(state)
    arrays = [restored["leaves"][str(index)] for index in range(len(restored["leaves"]))]
    if [_type(array) for array in arrays] != [_type(_data(leaf)) for leaf in leaves]:
        raise UsageError(f"{file} is damaged: it holds arrays of other shapes or types than this run has.")
    return jax.tree.unflatten(treedef, map(_like, arrays, leaves)), json.loads(restored["log"])


def _data(leaf: Any) -> Any:
    """The numbers of a leaf, which may be a key."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(array: Any, leaf: Any) -> Any:
    """The numbers as what the leaf is, and where it is."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else array


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _type(array: Any) -> tuple[Any, ...]:
    return array.shape, np.dtype(array.dtype)
