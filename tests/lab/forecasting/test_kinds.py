from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import wnn_jax
from wnn_jax.lab.forecasting.kinds import KINDS
from wnn_jax.lab.forecasting.trajectories import load_trajectories
from wnn_jax.lab.forecasting.windows import WindowSampler


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("kind_name", ["wnn", "wnn-plus", "pooled-linear"])
def test_errors_are_those_of_the_nowcaster(collection: Path, kind_name: str):
    kind = KINDS[kind_name]
    runs = [run for run in load_trajectories([collection]) if run.split == "train"]
    sampler = WindowSampler(runs, ("bias", "dense"), kind.statistics, num_weights=64)
    batch = sampler.batch(0, 0, windows_per_role=8)
    windows = batch.windows
    params = kind.init(jax.random.key(0), batch.roles)
    errors = jax.device_get(kind.errors(params, batch))
    nowcaster: Any = kind.nowcaster(params, record={})
    # The bias of the hidden layer has 64 weights, so a window holds the whole tensor, as the nowcaster needs it.
    whole = [number for number in range(0, 16, 2) if len(np.unique(windows.history[number, 0])) == 64]
    assert whole
    for number in whole[:2]:
        history = [{"bias": snapshot} for snapshot in windows.history[number]]
        forecast = nowcaster(history, {"bias": "bias"}, 5 if len(kind.horizons) > 1 else None)["bias"]
        actual, last = windows.targets[number, 4], windows.history[number, -1]
        expected = np.abs(forecast - actual).sum() / np.abs(last - actual).sum()
        np.testing.assert_allclose(errors[number, 4], expected, rtol=1e-4)
    moved = np.abs(windows.targets - windows.history[:, -1:]).sum(axis=-1) > 0
    is_forecast = np.isin(np.arange(1, 41), kind.horizons)
    np.testing.assert_array_equal(np.isfinite(errors), windows.is_known & moved & is_forecast)
    assert np.isfinite(kind.loss(params, batch))


@pytest.mark.parametrize("kind_name", sorted(KINDS))
def test_a_nowcaster_of_every_kind_can_be_saved(tmp_path: Path, kind_name: str):
    kind = KINDS[kind_name]
    nowcaster: Any = kind.nowcaster(kind.init(jax.random.key(0), ("bias", "dense")), record={"kind": kind_name})
    wnn_jax.save(nowcaster, tmp_path / "nowcaster.npz")
    loaded: Any = wnn_jax.load(tmp_path / "nowcaster.npz")
    assert type(loaded) is type(nowcaster)
    assert loaded.record == {"kind": kind_name}
