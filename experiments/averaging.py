"""Averages of weights on CIFAR-10 at equal cost: SWA, LAWA, EMA, TWA, and TWA after nowcasts.

    python -m experiments.averaging --data-dir DIR

A ResNet with batch normalisation (8-16-32 features, one block per stage) on images of 16x16, mirrored at random. SGD
with Nesterov momentum 0.9, batches of 128, weight decay 5e-4 of kernels. Every arm may take 8 epochs of 359 steps in
all. `annealed` decays to 0; everything else is of runs at a constant rate. SWA and LAWA (the latest 3 epochs) average
the second half; the arm `averages` has both as readings, beside the moving averages of every arm. TWA has 6 epochs of
such a run, the checkpoints after its epochs 4, 5 and 6, and 2 epochs for their coefficients: on the training images
(`twa-t`), or on 4,000 that were taken from the training images and that the run did not see (`twa-v`). The nowcaster
is the default, 4 snapshots an epoch. Averages have their batch statistics estimated anew.

**The table below is of the program that came before this one, and was not run again**: at single rates (0.1 annealed,
0.05 else) where every arm now has its own best of two, an EMA of 0.998, weight decay in the loss, other mirrored
images in a batch, and batch statistics of a whole epoch where there are now 32 batches. CPU, 2 cores; Python 3.11, jax
0.10.2, optax 0.2.8; 3 seeds. Accuracies in %, mean ± std. The results are in `results/averaging/`.

| arm | validation | test |
|---|---|---|
| sgd, cosine | 67.95 ± 0.10 | 68.33 ± 0.23 |
| sgd, constant | 59.41 ± 1.62 | 60.07 ± 1.43 |
| swa | 66.44 ± 0.43 | 67.06 ± 0.22 |
| lawa-3 | 66.51 ± 0.10 | 67.14 ± 0.15 |
| ema | 67.52 ± 0.39 | 67.88 ± 0.50 |
| twa-t | 65.22 ± 0.93 | 66.15 ± 0.06 |
| twa-t, conference | 65.11 ± 1.04 | 65.83 ± 0.57 |
| twa-t, 4 bits | 65.28 ± 1.04 | 66.09 ± 0.13 |
| twa-v | 64.68 ± 0.22 | 65.16 ± 0.67 |
| nowcast | 61.24 ± 4.89 | 61.62 ± 3.35 |
| nowcast, twa-t | 65.29 ± 0.53 | 66.28 ± 0.26 |

What this says. Every average is far above the run that it averages, and annealing is above every average: 68.3 %
against 67.9 (EMA), 67.1 (LAWA), 67.1 (SWA). That TWA is better than SWA is not confirmed at equal cost: 2 of 8 epochs
for the coefficients of 3 checkpoints are worth less than as epochs of the run (66.2 against 67.1). Four bits lose
nothing that 3 seeds could show, and the form of the conference is no better. On held-out images (`twa-v`) it is
worst, having fewer images for both parts. TWA adds much to a run with nowcasts (61.6 to 66.3), as to one without
(60.1); nowcasts add to TWA no more than the noise (66.3 ± 0.3 against 66.2 ± 0.1), and by themselves, at this noisy
constant rate, nothing that 3 seeds could show. All this is of short trainings, far from converged, with one untuned
rate for the coefficients (0.02); the papers average runs that have converged.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.meta.evaluation.stages import TrainCoefficients
from wnn_jax.meta.tasks.image_classification import ImageClassification
from wnn_jax.meta.tasks.task import Task
from wnn_jax.meta.training.arm import Arm
from wnn_jax.meta.training.readings import Reading

WEIGHT_DECAY = 5e-4
# An eighth of the training, about an epoch.
CHECKPOINTS = 8
TWA = TrainCoefficients(share=0.25)
# Training images that `twa-v` keeps for the coefficients.
NUM_HELD_OUT = 4_000


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    """SGD with Nesterov momentum, and weight decay of matrices and convolution kernels."""
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
        optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    )


def warmed_up(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Constant, after a linear warm-up over an eighth of the training."""
    return optax.warmup_constant_schedule(0.0, learning_rate, num_steps // 8)


def annealed(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Warmed up, and decayed to 0 by a cosine."""
    return sgd(optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 8, num_steps))


def with_checkpoints(learning_rate: float, num_steps: int, *, nowcasts: bool = False) -> optax.GradientTransformation:
    """The latest 3 checkpoints kept, and perhaps nowcasts, until an eighth before the coefficients' turn."""
    period = num_steps // CHECKPOINTS
    jumps = wnn_jax.nowcast(snapshot_every=period // 4, stop=TWA.first_step(num_steps) - period // 2)
    parts = [sgd(warmed_up(learning_rate, num_steps)), *([jumps] if nowcasts else []), averaging.lawa(3, period)]
    return optax.chain(*parts)


def with_averages(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """The second half averaged in two ways."""
    period, half = num_steps // CHECKPOINTS, num_steps // 2
    return optax.chain(
        sgd(warmed_up(learning_rate, num_steps)),
        averaging.uniform(half, period),
        averaging.lawa(3, period, half),
    )


def without_held_out(task: Task) -> Task:
    """The task without the training images that are kept for the coefficients."""
    assert isinstance(task, ImageClassification)
    return task.with_training_examples(slice(NUM_HELD_OUT, None))


def held_out(task: Task) -> Task:
    """The task on those training images alone."""
    assert isinstance(task, ImageClassification)
    return task.with_training_examples(slice(NUM_HELD_OUT))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("annealed", annealed, is_plain=True),
        Arm("constant", lambda rate, num_steps: sgd(warmed_up(rate, num_steps)), is_plain=True),
        Arm(
            "averages",
            with_averages,
            readings={
                "SWA": Reading(lambda params, state: averaging.uniform_eval_params(state, params)),
                "LAWA": Reading(lambda params, state: averaging.lawa_eval_params(state, params)),
            },
        ),
        Arm("twa-t", with_checkpoints, stages=(TWA,)),
        Arm("twa-t-conference", with_checkpoints, stages=(TrainCoefficients(share=0.25, form="orthonormal"),)),
        Arm("twa-t-4-bits", with_checkpoints, stages=(TrainCoefficients(share=0.25, bits=4),)),
        Arm("twa-v", with_checkpoints, stages=(TrainCoefficients(share=0.25, task=held_out),), task=without_held_out),
        Arm("nowcast", functools.partial(with_checkpoints, nowcasts=True)),
        Arm("nowcast-twa-t", functools.partial(with_checkpoints, nowcasts=True), stages=(TWA,)),
    )
}

CONFIG = Compare(
    task="cifar10-16-resnet",
    arms=tuple(ARMS),
    learning_rates=(0.05, 0.1),
    search_seeds=(10,),
    num_steps=8 * 359,
    evaluate_every=359,
    output=Path("runs/averaging"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, base=sgd, arms=ARMS)
