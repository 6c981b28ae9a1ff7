"""Averages of weights on CIFAR-10 at equal total cost: SWA, LAWA, EMA, TWA, and each of them with a drift.

    python -m experiments.averaging --data-dir DIR
    python -m experiments.averaging --data-dir DIR --methods annealed averages twa-adam twa-tail
        --num-steps 1432 --evaluate-every 358 --output runs/averaging/quarter
    python -m experiments.averaging --data-dir DIR --methods annealed averages twa-adam twa-tail
        --num-steps 2954 --evaluate-every 537 --output runs/averaging/half
    python -m experiments.averaging --data-dir DIR --methods annealed --learning-rates 0.4 --search-seeds None
        --num-steps 11814 --evaluate-every 1074 --output runs/averaging/double

A ResNet with batch normalisation (8-16-32 features, one block per stage, height and width halved by the first layer) on
images of 16x16, mirrored at random: 23,000 of the training images, so that 33 epochs of 179 steps can be afforded. SGD
with Nesterov momentum 0.9, batches of 128, weight decay 5e-4 of kernels. What a method takes before its coefficients
counts: all methods take 33 epochs in all, those with TWA 30 of a base run and 3 (a tenth of it) of the coefficients. The
other calls do the same with a quarter, half and twice of the epochs, to tell how long each needs to a given accuracy.

| method | base run | then |
|---|---|---|
| annealed | decays to 0 by a cosine | |
| averages | constant rate | read as SWA (second half), LAWA (latest 5 epochs), EMA .99 and .998 |
| averages-lowered | twice the rate in the first half | the same |
| drift | constant rate, `wnn_jax.nowcast()` | the same |
| twa-adam | constant rate 0.2 | the 13 latest epochs, from their mean (head stage); Adam, cosine |
| twa-sgd | the same | SGD with momentum, cosine |
| twa-conference | the same | one coefficient for all tensors; SGD, a tenth of the rate at 5/10 and at 8/10 |
| twa-4-bits | the same | as twa-adam |
| twa-tail | rate 0.2, then 0.1 in the second half | as twa-adam, from the last checkpoint (tail stage) |
| drift-twa | constant rate 0.1, `wnn_jax.nowcast()` | as twa-adam |
| twa-v | 20,000 of the images | as twa-adam, on the other 3,000 |

Every method has the best of its rates by one seed (10) that is not among the three reported, on the validation split. The
base run of TWA is at the best rate of the same run averaged (`averages`, `averages-lowered`, `drift`), its coefficients
at one rate, which makes little difference: with seed 10, validation accuracies of TWA are 63.32, 63.18 and 63.12 % at
0.003, 0.01 and 0.03 with Adam, and 63.25, 63.30 and 62.92 at 0.06, 0.2 and 0.6 with SGD. Averages have their batch
statistics estimated anew.

The best rate of every base run lies inside its grid. CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 3 seeds; the
results are in `results/averaging/`. Accuracies in %, mean ± standard deviation; total cost is the same.

| method | rate | read from | validation | test | test loss |
|---|---|---|---|---|---|
| annealed | 0.4 | EMA .998 | 63.80 ± 0.73 | 63.35 ± 0.52 | 1.047 ± 0.010 |
| averages | 0.2 | EMA .998 | 63.54 ± 1.17 | 63.72 ± 0.80 | 1.014 ± 0.016 |
| | | EMA .99 | 63.03 ± 1.36 | 63.40 ± 0.84 | 1.027 ± 0.015 |
| | | SWA | 63.00 ± 1.21 | 63.09 ± 0.63 | 1.036 ± 0.013 |
| | | LAWA | 62.44 ± 1.39 | 62.88 ± 0.68 | 1.035 ± 0.017 |
| | | weights | 55.15 ± 2.34 | 55.93 ± 2.35 | 1.268 ± 0.076 |
| averages-lowered | 0.1 | EMA .998 | 63.60 ± 1.01 | **64.01** ± 0.82 | 1.015 ± 0.013 |
| | | SWA | 63.18 ± 0.89 | 63.43 ± 0.32 | 1.028 ± 0.015 |
| | | LAWA | 63.29 ± 0.85 | 63.32 ± 0.57 | 1.035 ± 0.007 |
| drift | 0.1 | EMA .998 | **64.28** ± 0.49 | **64.00** ± 0.55 | **1.012** ± 0.011 |
| | | SWA | 63.35 ± 1.00 | 63.60 ± 0.38 | 1.032 ± 0.009 |
| | | LAWA | 63.85 ± 0.52 | 63.60 ± 0.75 | 1.028 ± 0.011 |
| twa-adam | base 0.2 | TWA | 63.27 ± 1.42 | 63.39 ± 0.35 | 1.031 ± 0.012 |
| twa-sgd | base 0.2 | TWA | 63.32 ± 1.24 | 63.29 ± 0.33 | 1.033 ± 0.011 |
| twa-4-bits | base 0.2 | TWA | 63.19 ± 1.37 | 63.35 ± 0.37 | 1.031 ± 0.013 |
| twa-conference | base 0.2 | TWA | 63.01 ± 1.07 | 63.10 ± 0.37 | 1.039 ± 0.013 |
| twa-tail | base 0.1 | TWA | 62.72 ± 1.38 | 63.01 ± 0.37 | 1.053 ± 0.012 |
| twa-v | base 0.2 | TWA | 61.36 ± 1.28 | 61.75 ± 1.11 | 1.078 ± 0.032 |
| drift-twa | base 0.1 | TWA | 63.59 ± 0.95 | 63.62 ± 0.83 | 1.038 ± 0.013 |

Steps saved to the end of `annealed` (63.80 % on the mean; 95 % interval): drift 8 % (4 to 15, all seeds reach it),
averages-lowered at most 11 (0 to 18, 2 of 3), averages and twa-adam at most 3 (1 of 3).

**Accuracy against total cost**, which is the other calls; validation accuracy, with that of the test split behind it,
of the reading that is best on the former for `annealed`, and of `averages` of the best EMA and of SWA. Rates were
searched anew for 8 and 16.5 epochs, and are the same as above (but for `averages` in 8 epochs: 0.4, the highest tried);
for 66 that above was taken. TWA has the base runs and rates of above, and their latest 13 checkpoints, in 8 epochs all
7:

| epochs in all | annealed | averages, EMA | averages, SWA | TWA, head stage | TWA, tail stage |
|---|---|---|---|---|---|
| 8 | 58.54 ± 0.65, 58.25 | 57.86 ± 0.75, 57.94 | 55.83 ± 0.45, 56.16 | 55.65 ± 0.43, 56.22 | 56.03 ± 0.40, 56.69 |
| 16.5 | 61.38 ± 1.06, 62.12 | 61.34 ± 0.71, 61.51 | 60.62 ± 0.39, 60.92 | 60.73 ± 0.22, 61.02 | 60.30 ± 0.61, 60.94 |
| 33 | 63.80 ± 0.73, 63.35 | 63.54 ± 1.17, 63.72 | 63.00 ± 1.21, 63.09 | 63.27 ± 1.42, 63.39 | 62.72 ± 1.38, 63.01 |
| 66 | 64.06 ± 0.44, 65.16 | | | | |

So TWA is at no length ahead of annealed SGD, nor of SWA by more than the noise. That checkpoints of the first half of a
run are enough for the accuracy of the whole, which is the paper's head stage, is not so here: from these TWA has 60.73
%, the whole run 63.80. On straight lines between the lengths, what annealed SGD has after 16.5 epochs, 61.38 %, TWA has
after 20.7 (head) and 23.9 (tail), SWA after 21.8 and the EMA after 16.8. A step of the coefficients takes 0.8 to 0.9 of
the time of a step of the weights, so that epochs are a fair measure (33 of annealed SGD: 64 s of steps, on one core).
The folders are `results/averaging/quarter/`, `half/` and `double/`.

What this says. At equal total cost TWA is level with SWA (0.3 points above it, less than the seeds differ), and below
the EMA of .998 of a run that has no second stage. So the paper's gain over SWA, in long trainings of large networks
(over 40 % less time on CIFAR, 30 % on ImageNet, at comparable accuracy, from checkpoints of the first half of a run),
is not confirmed here. How much the base run matters: at a rate of 0.05, which had not been tuned, TWA had 61.0 % (and
SWA 62.3 at 0.1). Four bits cost nothing, and SGD or Adam of the coefficients are alike; one coefficient for all tensors
is 0.3 points worse, and the tail stage no better than the head stage. `twa-v` pays for the 3,000 images that it holds
out, an eighth of all, with 1.6 points: so few coefficients have no need of images of their own. A drift adds 0.2 to 0.7
points to every average, least to TWA and to the EMA; the seeds differ by as much (`experiments/together.py`, with
late-phase weights beside them). An average of a run at a constant rate is as good as annealing in accuracy, and better
in loss.

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

The program before this one, on all images for 8 epochs, 3 seeds and one untuned rate per method, had on the test images:
annealed 68.33 ± 0.23 %, EMA .998 67.88 ± 0.50, LAWA 67.14 ± 0.15, SWA 67.06 ± 0.22, TWA (2 of the 8 epochs for the
coefficients of 3 checkpoints) 66.15 ± 0.06, nowcasts and TWA 66.28 ± 0.26, the constant rate that all averages are of
60.07 ± 1.43.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax.lab.comparing.comparison import Compare, main
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import load_task
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.tasks.task import Task
from wnn_jax.lab.training.evaluation_weights import Reading
from wnn_jax.lab.training.method import Method, same_task
from wnn_jax.lab.training.stages import TrainCoefficients

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


# Of the runs that TWA has the checkpoints of: the best of the methods that average those, by the seed of the search.
BASE_RATES = {constant: 0.2, lowered: 0.1, drifted: 0.1}


def averages(name: str, make_optimizer: Any) -> Method:
    """The second half of a training averaged in two ways, a checkpoint every epoch."""

    def with_averages(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        swa, lawa = averaging.uniform(num_steps // 2, EPOCH), averaging.lawa(LAWA_SIZE, EPOCH)
        return optax.chain(make_optimizer(learning_rate, num_steps), swa, lawa)

    readings = {
        "SWA": Reading(lambda params, state: averaging.uniform_eval_params(state, params)),
        "LAWA": Reading(lambda params, state: averaging.lawa_eval_params(state, params)),
    }
    return Method(name, with_averages, readings=readings)


def twa(name: str, make_optimizer: Any = constant, *, base_task: Any = same_task, **options: Any) -> Method:
    """The latest checkpoints of a training at its own rate; the method's rate is that of their coefficients."""

    def with_checkpoints(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        del learning_rate
        least = math.ceil(2 * EPOCH / (1 - SHARE))
        if num_steps < least:
            raise UsageError(
                f"--num-steps {num_steps}: the method {name!r} needs 2 checkpoints, one every {EPOCH} steps; give at "
                f"least {least}."
            )
        return optax.chain(
            make_optimizer(BASE_RATES[make_optimizer], num_steps), averaging.lawa(NUM_CHECKPOINTS, EPOCH)
        )

    return Method(name, with_checkpoints, stages=(TrainCoefficients(share=SHARE, **options),), task=base_task)


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


METHODS = {
    method.name: method
    for method in (
        Method("annealed", annealed, is_plain=True),
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

CONSTANT_RATES = (0.025, 0.05, 0.1, 0.2, 0.4)
ADAM_RATES = (0.01,)
SGD_RATES = (0.2,)

CONFIG = Compare(
    task=TASK,
    methods=tuple(METHODS),
    optimizer="sgd",
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
    main(CONFIG, __doc__, make_task=make_task, base=sgd, methods=METHODS)
