import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import wnn_jax
from wnn_jax.lab.forecasting.collection import Collection
from wnn_jax.lab.forecasting.objectives import OBJECTIVES, Objective, known_changes
from wnn_jax.lab.forecasting.windows import WindowBatch, WindowSampler


def draw(collection: Path, objective: Objective) -> WindowBatch:
    runs = [trajectory for trajectory in Collection(collection).trajectories() if trajectory.split == "train"]
    sampler = WindowSampler(
        runs,
        ("bias", "dense"),
        objective.statistics,
        num_weights=64,
        min_stride=1,
        max_stride=1,
        offsets=objective.offsets,
        min_horizon=objective.horizons[-1] if len(objective.horizons) == 1 else 5,
    )
    return sampler.batch(0, 0, windows_per_role=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptive-linear", "pooled", "wnn", "wnn-plus"])
def test_errors_are_those_of_the_nowcaster(collection: Path, kind: str):
    objective = OBJECTIVES[kind]
    batch = draw(collection, objective)
    horizon = objective.horizons[0] if len(objective.horizons) == 1 else 5
    windows = batch.windows
    params = objective.init(jax.random.key(0), batch.roles)
    errors = jax.device_get(objective.errors(params, batch))
    nowcaster = objective.nowcaster(params, {})
    # The bias of the hidden layer has 64 weights and is drawn whole: the nowcaster sees the same tensor.
    for number in range(0, 4, 2):
        if len(np.unique(windows.history[number, 0])) < 64:
            continue
        history = [{"bias": snapshot} for snapshot in windows.history[number]]
        forecast = nowcaster(history, {"bias": "bias"}, 5 if len(objective.horizons) > 1 else None)["bias"]
        actual, last = windows.targets[number, horizon - 1], windows.history[number, -1]
        expected = np.abs(forecast - actual).sum() / np.abs(last - actual).sum()
        np.testing.assert_allclose(errors[number, horizon - 1], expected, rtol=1e-4)
    is_forecast = np.isin(np.arange(1, 41), objective.horizons)
    np.testing.assert_array_equal(np.isfinite(errors), np.asarray(known_changes(windows)) & is_forecast)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_a_nowcaster_of_every_kind_can_be_saved(tmp_path: Path, kind: str):
    objective = OBJECTIVES[kind]
    nowcaster: Any = objective.nowcaster(objective.init(jax.random.key(0), ("bias", "dense")), {"kind": kind})
    wnn_jax.save(nowcaster, tmp_path / "nowcaster.npz")
    loaded: Any = wnn_jax.load(tmp_path / "nowcaster.npz")
    assert type(loaded) is type(nowcaster)
    assert loaded.record == {"kind": kind}


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_an_objective_says_what_it_is(kind: str):
    objective: Any = OBJECTIVES[kind]
    assert dataclasses.is_dataclass(objective)
    assert " at 0x" not in repr(objective)
