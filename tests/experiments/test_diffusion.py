import csv
import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments import diffusion
from tests.meta.tasks.synthetic import synthetic_images
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.tasks.denoising import Denoising


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array) -> jax.Array:
        return nn.Conv(1, (3, 3))(images) + 0 * times[:, None, None, None]


@pytest.mark.slow
def test_arms_draw_what_they_learned_of_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Denoising(dataset=synthetic_images("mnist-14"), model=Convolution(), batch_size=8)
    monkeypatch.setattr(diffusion, "load_task", lambda name, data_dir: task)
    monkeypatch.setattr(Denoising, "sample", lambda self, params, noise: (given.append((params, noise)), noise)[1])
    given: list[Any] = []
    options = dataclasses.replace(diffusion.CONFIG, num_steps=20, output=tmp_path)
    diffusion.draw_samples(options)
    with (tmp_path / "mnist-diffusion-20.csv").open() as file:
        plain, drift = csv.DictReader(file)
    assert (plain["arm"], drift["arm"]) == ("plain", "drift")
    assert (tmp_path / "mnist-diffusion-20.png").exists()
    (plain_params, noise), (drift_params, same_noise) = given
    np.testing.assert_array_equal(noise, same_noise)
    for params, row in ((plain_params, plain), (drift_params, drift)):
        sums = [jax.jit(task.measure)(params, {}, batch)["mse"] for batch in task.evaluation_batches("test")]
        total, weight = np.sum(sums, axis=0)
        assert float(row["test mse"]) == pytest.approx(total / weight, rel=1e-4)
    assert plain["test mse"] != drift["test mse"]


def test_images_are_put_side_by_side() -> None:
    images = np.arange(36)[:, None, None, None] * np.ones([1, 2, 3, 1])
    grid = diffusion.tile(images)
    assert grid.shape == (18, 24, 1)
    assert grid[4, 9, 0] == 8
    assert grid[2, 3, 0] == 1


def test_another_kind_of_task_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "load_task", lambda name, data_dir: pytest.fail("loads data"))
    options = dataclasses.replace(diffusion.CONFIG, task="digits-cnn", data_dir=tmp_path)
    with pytest.raises(UsageError, match="--task 'digits-cnn' is no denoising; choose from mnist-diffusion, "):
        diffusion.draw_samples(options)
