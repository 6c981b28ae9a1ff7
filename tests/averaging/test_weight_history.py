from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import assert_trees_equal
from wnn_jax import averaging
from wnn_jax.averaging import WeightHistory


def params_after(step: int) -> Any:
    return {"kernel": jnp.full((2, 3), step + 0.5), "bias": jnp.full(3, -float(step))}


def collect(num_steps: int, first: int = 0, **options: Any) -> WeightHistory:
    history = WeightHistory(**options)
    for step in range(first, num_steps):
        taken = history.update(step, params_after(step))
        assert taken == (step in history.steps)
    return history


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {} if request.param == "memory" else {"folder": tmp_path / "history"}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"period": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"period": 3, "start_step": 4}, [6, 9]),
        ({"period": 2, "size": 2}, [7, 9]),
        ({"period": 20}, []),
        ({"period": 5, "dtype": jnp.bfloat16}, [4, 9]),
        ({"period": 5, "dtype": "float16"}, [4, 9]),
    ],
)
def test_what_is_kept(place: dict[str, Any], options: dict[str, Any], steps: list[int]):
    history = collect(10, **options, **place)
    assert history.steps == steps
    assert len(history) == len(steps)
    for checkpoint, step in zip(history, steps, strict=True):
        expected = jax.tree.map(lambda leaf: leaf.astype(options.get("dtype", leaf.dtype)), params_after(step))
        assert_trees_equal(checkpoint, expected)
    history.close()


def test_donated_parameters_are_copied():
    history = WeightHistory(period=1)
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    params = params_after(0)
    for index in range(3):
        params = step(params)
        history.update(index, params)
    assert [checkpoint["kernel"][0, 0].item() for checkpoint in history] == [1.5, 2.5, 3.5]


def test_a_history_on_disk_goes_on(tmp_path: Path):
    collect(5, period=2, size=3, folder=tmp_path).close()
    history = collect(10, first=3, period=2, size=3, folder=tmp_path)
    assert history.steps == [5, 7, 9]
    history.close()


def test_checkpoints_of_any_run_make_a_subspace(tmp_path: Path):
    values = [[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [2.0, 3.0, 2.0]]
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, value in enumerate(values):
            manager.save(step, args=ocp.args.StandardSave({"bias": jnp.array(value)}))
    subspace = averaging.make_subspace(WeightHistory(period=1, folder=tmp_path))
    combined = averaging.combine(subspace, averaging.init_coefficients(subspace))
    np.testing.assert_allclose(combined["bias"], 2.0, rtol=1e-6)


def test_dtypes_are_of_floats():
    with pytest.raises(ValueError, match=r"dtype='int8' must be a floating-point dtype"):
        WeightHistory(period=1, dtype="int8")
