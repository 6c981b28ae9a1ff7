import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.checkpoints import Checkpoints, load_state, save_state
from wnn_jax.lab.training.step import TrainState


def state(step: int) -> TrainState:
    weights = jnp.asarray(np.random.default_rng(step).normal(size=1_000), jnp.float32)
    return TrainState(jnp.int32(step), {"dense": weights}, {}, ())


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints that were saved three times, and keep the last two."""
    checkpoints = Checkpoints(tmp_path / "stage-0", 0.0)
    for step in (8, 9, 10):
        checkpoints.save(step, state(step), [step])
    return checkpoints


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_tree_of_arrays_comes_back_as_it_was(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "empty": jnp.zeros([0, 2]),
        "key": jax.random.key(3),
        "many": [jnp.full([], index) for index in range(12)],
        "not finite": jnp.array([jnp.nan, -jnp.inf]),
        "numpy": np.arange(3.0),
    }
    save_state(tmp_path / "state", tree, {"loss": [0.1, None]})
    loaded, log = load_state(tmp_path / "state", tree)
    assert jax.random.bits(loaded.pop("key")) == jax.random.bits(tree.pop("key"))
    assert_trees_equal(loaded, tree)
    assert log == {"loss": [0.1, None]}


def test_the_last_two_are_kept(saved: Checkpoints, tmp_path: Path) -> None:
    assert contents(tmp_path / "stage-0").keys() == {"9", "10"}
    restored, log = saved.restore(state(0), None)
    assert_trees_equal(restored, state(10))
    assert log == [10]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda content: content[:-1], lambda content: b""])
def test_a_damaged_one_leaves_the_one_before(
    saved: Checkpoints, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "stage-0" / "10"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(tmp_path / "stage-0")
    restored, log = saved.restore(state(0), None)
    assert_trees_equal(restored, state(9))
    assert log == [9]
    assert contents(tmp_path / "stage-0") == before, "nothing is removed"
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/stage-0/10 cannot be read: it is damaged")
    assert message.endswith("The run goes on from the checkpoint before, of step 9.")


def test_damaged_ones_alone_are_an_error_that_names_the_folder(saved: Checkpoints, tmp_path: Path) -> None:
    for file in (tmp_path / "stage-0").iterdir():
        file.write_bytes(flip_a_bit(file.read_bytes()))
    before = contents(tmp_path / "stage-0")
    with pytest.raises(
        UsageError, match=rf"stage-0/10 cannot be read: it is damaged.*\. Remove {tmp_path}/stage-0: "
    ) as refused:
        saved.restore(state(0), None)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path / "stage-0") == before


def test_a_checkpoint_of_something_else_is_refused(saved: Checkpoints) -> None:
    other = state(0)._replace(params={"dense": jnp.zeros([10, 100])})
    with pytest.raises(UsageError, match="it holds arrays of other shapes or types than this run has"):
        saved.restore(other, None)


def test_a_full_disk_leaves_what_is_there(saved: Checkpoints, tmp_path: Path) -> None:
    before = contents(tmp_path / "stage-0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            saved.save(11, state(11), [11])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "stage-0") == before


def test_a_run_without_a_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "stage-0", 1_000.0)
    given = state(0)
    assert checkpoints.restore(given, [1]) == (given, [1])
    checkpoints.save(1, state(1), [])
    assert not list(tmp_path.iterdir())
