"""Averages of weights on CIFAR-10 at equal total cost: SWA, LAWA, EMA, TWA, and each of them with a drift.

    python -m experiments.averaging --data-dir DIR
    python -m experiments.averaging --data-dir DIR --arms annealed --num-steps 2954 --evaluate-every 537
    python -m experiments.averaging --data-dir DIR --arms annealed --num-steps 11814 --evaluate-every 1074

A ResNet with batch normalisation (8-16-32 features, one block per stage, height and width halved by the first layer) on
images of 16x16, mirrored at random: 23,000 of the training images, so that 33 epochs of 179 steps can be afforded. SGD
with Nesterov momentum 0.9, batches of 128, weight decay 5e-4 of kernels. What an arm takes before its coefficients
counts: all arms take 33 epochs in all, those with TWA 30 of a base run and 3 (a tenth of it) of the coefficients. The
second and the third call train `annealed` alone for half and for twice as long, to tell how long it needs to what TWA
has after 33 epochs.

| arm | base run | then |
|---|---|---|
| annealed | decays to 0 by a cosine | |
| averages | constant rate | read as SWA (second half), LAWA (latest 5 epochs), EMA .99 and .998 |
| averages-lowered | twice the rate in the first half | the same |
| drift | constant rate, `wnn_jax.nowcast()` | the same |
| twa-adam | constant rate 0.05 | the 13 latest epochs, from their mean (head stage); Adam, cosine |
| twa-sgd | the same | SGD with momentum, cosine |
| twa-conference | the same | one coefficient for all tensors; SGD, a tenth of the rate at 5/10 and at 8/10 |
| twa-4-bits | the same | as twa-adam |
| twa-tail | rate 0.1, then 0.05 in the second half | as twa-adam, from the last checkpoint (tail stage) |
| drift-twa | constant rate 0.05, `wnn_jax.nowcast()` | as twa-adam |
| twa-v | 20,000 of the images | as twa-adam, on the other 3,000 |

Every arm has the best of its rates by one seed (10) that is not among the three reported, on the validation split: TWA
those of its coefficients, the others those of the weights. Averages have their batch statistics estimated anew.

**Of the arms, four have been run**, with their searches; tail stage, conference form, few bits, held-out images, a
lowered rate, the arms with a drift and the calls of other lengths have not. CPU, 2 cores; Python 3.11, jax 0.10.2,
optax 0.2.8; 3 seeds; the results are in `results/averaging/`. Accuracies in %, mean ± standard deviation; total cost is
the same.

| arm | rate | read from | validation | test |
|---|---|---|---|---|
| annealed | 0.4* | EMA .998 | 63.80 ± 0.73 | 63.35 ± 0.52 |
| averages | 0.1* | EMA .998 | 63.20 ± 0.16 | 62.78 ± 0.41 |
| | | EMA .99 | 63.03 ± 0.23 | 62.62 ± 0.60 |
| | | LAWA | 62.54 ± 0.61 | 62.37 ± 0.67 |
| | | SWA | 62.35 ± 0.53 | 62.29 ± 0.13 |
| | | weights | 57.75 ± 1.39 | 58.24 ± 1.32 |
| twa-adam | 0.003* | TWA | 60.81 ± 0.52 | 61.05 ± 0.19 |
| twa-sgd | 0.2 | TWA | 60.84 ± 0.51 | 60.92 ± 0.22 |

* at the edge of the grid: for annealed SGD and for averages a still higher rate might be better.

What this says. That TWA is better than SWA at equal total cost, or reaches it sooner, is not confirmed: it never
reaches what annealed SGD has at the end, and no rate of its coefficients, from 0.003 to 0.1 with Adam and from 0.06 to
2 with SGD, makes a difference of more than 0.4 points (seed 10). Part of it is the base run, whose rate of 0.05 was not
tuned: at that rate, with seed 10, SWA has 60.50 %, LAWA 60.17, an EMA of .998 60.62, TWA 59.9 to 60.1; at 0.1 SWA has
61.45. So TWA is level with the averages that cost nothing, or a little below them, and all of them gain by a higher
rate. The paper has its gains after 100 and more epochs of a large network.

Before, by hand, with seed 10 on 11,500 images and without halving height and width, 30 epochs of 89 steps at 0.05
and 267 steps of the coefficients (validation; CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8):

| | training loss | accuracy | loss |
|---|---|---|---|
| weights | 0.868 | 52.85 | 1.447 |
| EMA .99 | | 62.00 | 1.094 |
| mean of the latest 5 | | 61.68 | 1.096 |
| mean of the latest 10 | | 61.68 | 1.090 |
| mean of all 30 | | 58.90 | 1.139 |
| twa, latest 10, Adam 0.02 | 0.653 | 61.75 | 1.181 |
| twa, latest 10, Adam 0.1 | 0.705 | 61.58 | 1.187 |
| twa, latest 10, SGD 0.2 | 0.671 | 61.43 | 1.177 |
| twa, latest 10, SGD 1 | 0.790 | 61.53 | 1.173 |
| twa, latest 10, SGD 5 | 1.322 | 59.75 | 1.193 |
| twa, latest 10, SGD 1, from the last | 0.793 | 61.45 | 1.173 |
| twa, latest 10, conference form, SGD 1 | 0.662 | 61.85 | 1.176 |
| twa, all 30, Adam 0.02 | 0.685 | 61.70 | 1.208 |
| twa, all 30, SGD 1 | 0.843 | 61.58 | 1.207 |

What this says. TWA lowers the loss of the images that it trains on far below that of the run, and repairs an average
with early checkpoints in it (58.9 to 61.7 %); it is no better in accuracy than the mean of the latest checkpoints,
which costs nothing, and worse in the loss of other images. On so few images the coefficients overfit as the weights do.

The program before this one, on all images for 8 epochs, 3 seeds and one untuned rate per arm, had on the test images:
annealed 68.33 ± 0.23 %, EMA .998 67.88 ± 0.50, LAWA 67.14 ± 0.15, SWA 67.06 ± 0.22, TWA (2 of the 8 epochs for the
coefficients of 3 checkpoints) 66.15 ± 0.06, nowcasts and TWA 66.28 ± 0.26, the constant rate that all averages are of
60.07 ± 1.43.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.meta.evaluation.stages import TrainCoefficients
from wnn_jax.meta.tasks import load_task
from wnn_jax.meta.tasks.image_classification import ImageClassification
from wnn_jax.meta.tasks.models import ResNet
from wnn_jax.meta.tasks.task import Task
from wnn_jax.meta.training.arm import Arm, same_task
from wnn_jax.meta.training.readings import Reading

TASK = "cifar10-16-resnet"
NUM_IMAGES = 23_000
# Steps of a pass over these images, and between checkpoints.
EPOCH = 179
# An eleventh of the training: a tenth of what the weights are trained for.
SHARE = 1 / 11
# Those of the second half.
NUM_CHECKPOINTS = 13
LAWA_SIZE = 5
WEIGHT_DECAY = 5e-4
# Training images that `twa-v` keeps for the coefficients.
NUM_HELD_OUT = 3_000


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


def constant(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Warmed up, and constant."""
    return sgd(warmed_up(learning_rate, num_steps))


def lowered(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Warmed up to twice the rate, and constant at the rate in the second half."""
    high, low = warmed_up(2 * learning_rate, num_steps), optax.constant_schedule(learning_rate)
    return sgd(optax.join_schedules([high, low], [num_steps // 2]))


def drifted(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Constant, with the default nowcaster."""
    return optax.chain(constant(learning_rate, num_steps), wnn_jax.nowcast())


# Of the runs that TWA has the checkpoints of: the best of the arms that average those, by the seed of the search.
BASE_RATES = {constant: 0.2, lowered: 0.1, drifted: 0.1}


def averages(name: str, make_optimizer: Any) -> Arm:
    """The second half of a training averaged in two ways, a checkpoint every epoch."""

    def with_averages(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        swa, lawa = averaging.uniform(num_steps // 2, EPOCH), averaging.lawa(LAWA_SIZE, EPOCH)
        return optax.chain(make_optimizer(learning_rate, num_steps), swa, lawa)

    readings = {
        "SWA": Reading(lambda params, state: averaging.uniform_eval_params(state, params)),
        "LAWA": Reading(lambda params, state: averaging.lawa_eval_params(state, params)),
    }
    return Arm(name, with_averages, readings=readings)


def twa(name: str, make_optimizer: Any = constant, *, base_task: Any = same_task, **options: Any) -> Arm:
    """The latest checkpoints of a training at its own rate; the arm's rate is that of their coefficients."""

    def with_checkpoints(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        del learning_rate
        return optax.chain(
            make_optimizer(BASE_RATES[make_optimizer], num_steps), averaging.lawa(NUM_CHECKPOINTS, EPOCH)
        )

    return Arm(name, with_checkpoints, stages=(TrainCoefficients(share=SHARE, **options),), task=base_task)


def sgd_by_cosine(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """SGD with momentum, warmed up over a fifth of the steps, and decayed to 0 by a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 5, num_steps)
    return optax.sgd(schedule, momentum=0.9)


def sgd_in_stairs(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """SGD with momentum, at a tenth of the rate from half of the steps on, and at a hundredth from eight tenths on."""
    stairs = optax.piecewise_constant_schedule(learning_rate, {num_steps // 2: 0.1, num_steps * 4 // 5: 0.1})
    return optax.sgd(stairs, momentum=0.9)


def without_held_out(task: Task) -> Task:
    """The task without the training images that are kept for the coefficients."""
    assert isinstance(task, ImageClassification)
    return task.with_training_examples(slice(NUM_HELD_OUT, NUM_IMAGES))


def held_out(task: Task) -> Task:
    """The task on those training images alone."""
    assert isinstance(task, ImageClassification)
    return task.with_training_examples(slice(NUM_HELD_OUT))


def make_task(data_dir: Path) -> Task:
    """The task on half of its training images, of which the network halves height and width at once."""
    task = load_task(TASK, data_dir)
    assert isinstance(task, ImageClassification)
    model = ResNet(features=(8, 16, 32), stem_strides=2)
    return dataclasses.replace(task, model=model).with_training_examples(slice(NUM_IMAGES))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("annealed", annealed, is_plain=True),
        averages("averages", constant),
        averages("averages-lowered", lowered),
        averages("drift", drifted),
        twa("twa-adam"),
        twa("twa-sgd", optimizer=sgd_by_cosine),
        twa("twa-conference", optimizer=sgd_in_stairs, form="orthonormal"),
        twa("twa-4-bits", bits=4),
        twa("twa-tail", lowered, begin="last"),
        twa("drift-twa", drifted),
        twa("twa-v", base_task=without_held_out, task=held_out),
    )
}

CONSTANT_RATES = (0.025, 0.05, 0.1, 0.2)
ADAM_RATES = (0.01,)
SGD_RATES = (0.2,)

CONFIG = Compare(
    task=TASK,
    arms=tuple(ARMS),
    learning_rates=(0.1, 0.2, 0.4, 0.8),
    own_rates={
        **dict.fromkeys(("averages", "averages-lowered", "drift"), CONSTANT_RATES),
        **dict.fromkeys(("twa-adam", "twa-4-bits", "twa-tail", "drift-twa", "twa-v"), ADAM_RATES),
        **dict.fromkeys(("twa-sgd", "twa-conference"), SGD_RATES),
    },
    search_seeds=(10,),
    num_steps=33 * EPOCH,
    evaluate_every=3 * EPOCH,
    output=Path("runs/averaging"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, make_task=make_task, base=sgd, arms=ARMS)
