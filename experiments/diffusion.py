"""Samples of a denoising network that was trained with and without the drift, for as many steps.

    python -m experiments.diffusion --data-dir DIR
    python -m experiments.diffusion --data-dir DIR --task cifar10-16-diffusion --num-steps 1200

The U-Net of `mnist-diffusion` (images of 14x14), Adam, 3,000 steps, seed 0. Both arms are at the best of four rates in
`experiments/acceleration.py`, which for both is the highest of the grid, and are read from the moving average of .99.
The 36 samples of an arm are made of the same noise as those of the other, by DDIM in 100 steps. CPU, 2 cores; Python
3.11, jax 0.10.2, optax 0.2.8; one run of each arm. The results are in `results/diffusion/`.

| arm | rate | validation squared error | test squared error |
|---|---|---|---|
| plain | 0.012 | 0.0836 | 0.0862 |
| drift | 0.012 | 0.0799 | 0.0823 |

What this says. Both arms make strokes like those of digits on a clean ground, and of the same noise mostly the same
figure. A third or so of the figures are digits, the others are broken or run together: the network is small and its
training is short. With the drift some strokes are whole that have gaps or stray pixels without it (first row, first and
second; fourth row, fifth and sixth), and a few are worse (first row, third; sixth row, fifth); which figures are digits
hardly changes. So the loss, which is lower by 4 %, can be seen in the samples, but barely. This is a look at one run of
each arm; no measure of the samples was taken.

**CIFAR-10 at 16x16**, 1,200 steps, the second command; both arms at the rate that is best for both in
`experiments/unseen_tasks.py`:

| arm | rate | validation squared error | test squared error |
|---|---|---|---|
| plain | 0.012 | 0.0970 | 0.0993 |
| drift | 0.012 | 0.0945 | 0.0966 |

Neither arm makes anything that could be named: of the same noise both make the same clouds of colour, with patches of
the size of things, most of them far more vivid than photographs. Those of the drift are paler, and nearer to the
colours of photographs (first, third and sixth row, first column; third row, third and fourth), and some have more
stray pixels (first row, second; fifth row, third).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from wnn_jax import averaging
from wnn_jax.meta.errors import UsageError, check_options, one_line_errors
from wnn_jax.meta.evaluation.arms import find_arms
from wnn_jax.meta.output import new_figure, save_rows
from wnn_jax.meta.tasks import load_task
from wnn_jax.meta.tasks.denoising import TASKS, Denoising
from wnn_jax.meta.training.arm import Arm
from wnn_jax.meta.training.optimizers import base_optimizer
from wnn_jax.meta.training.readings import ema_name, with_moving_averages
from wnn_jax.meta.training.trainer import Trainer

DECAY = 0.99
NUM_ROWS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Train a denoising network by several arms, and draw what each of them makes of the same noise."""

    task: str = "mnist-diffusion"
    """What to train."""
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"plain": 1.2e-2, "drift": 1.2e-2})
    """Of each arm."""
    num_steps: int = 3_000
    """Length of a run in optimizer steps."""
    seed: int = 0
    """Of the runs, and of the noise."""
    output: Path = Path("runs/diffusion")
    """Folder for pictures and tables."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""


def draw_samples(options: Samples) -> None:
    """Trains, and writes a picture and a table.

    Raises:
      UsageError: if an option cannot be used, or data is missing.
    """
    check_options(options, positive=("num_steps",))
    if options.task not in TASKS:
        raise UsageError(f"--task {options.task!r} is no denoising; choose from {', '.join(TASKS)}.")
    arms = find_arms(options.learning_rates, base_optimizer("adam"))
    task = load_task(options.task, options.data_dir.absolute())
    assert isinstance(task, Denoising)
    real = task.dataset.test.images[: NUM_ROWS**2]
    noise = jax.random.normal(jax.random.key(options.seed), real.shape)
    panels = {"test images": real / task.dataset.max_value}
    rows = []
    for arm in arms:
        params, row = train(task, arm, options)
        rows.append(row)
        panels[f"{arm.name}, mse {row['validation mse']:.4f}"] = np.asarray(task.sample(params, noise))
    name = f"{options.task}-{options.num_steps}"
    save_rows(rows, options.output / f"{name}.csv")
    with new_figure(options.output / f"{name}.png", 1, len(panels), figsize=(4 * len(panels), 4.3)) as (_, axes):
        for axis, (title, images) in zip(axes, panels.items(), strict=True):
            axis.imshow(tile(images), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title)
            axis.set_axis_off()


def train(task: Denoising, arm: Arm, options: Samples) -> tuple[Any, dict[str, Any]]:
    """Trains a network by an arm.

    Returns:
      The moving average of its parameters, and what that scores.
    """
    rate = options.learning_rates[arm.name]
    averaged = dataclasses.replace(
        arm, optimizer=lambda rate, num_steps: with_moving_averages(arm.optimizer(rate, num_steps), (DECAY,))
    )
    fitted = Trainer(task, averaged, learning_rate=rate, num_steps=options.num_steps).fit(options.seed)
    reading = ema_name(DECAY)
    params = averaging.ema_eval_params(fitted.state.opt_state[reading], fitted.state.params)
    params, _ = arm.view.network(params, fitted.state.model_state)
    last = fitted.evaluations[-1]
    return params, {
        "arm": arm.name,
        "learning_rate": rate,
        "num_steps": last.step,
        "seconds": last.seconds,
        "reading": reading,
        "validation mse": last.scores[reading]["mse"],
        "test mse": fitted.test[reading]["mse"],
    }


def tile(images: np.ndarray) -> np.ndarray:
    """Images `[n, height, width, channels]`, of which n is a square, as one, with a white line between them."""
    height, width, channels = np.shape(images)[1:]
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=1)
    grid = padded.reshape(NUM_ROWS, NUM_ROWS, height + 1, width + 1, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(NUM_ROWS * (height + 1), NUM_ROWS * (width + 1), channels)


CONFIG = Samples()

if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n\n")[0]
    options = tyro.cli(Samples, prog="python -m experiments.diffusion", description=summary, default=CONFIG)
    with one_line_errors():
        draw_samples(options)
