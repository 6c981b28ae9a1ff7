"""Averages of checkpoints on a residual network: SWA, LAWA, EMA and trainable weight averaging (TWA).

    python -m experiments.averaging --data-dir DIR

The record is `averaging.md`. `quarter`, `half` and `double` are runs of other lengths.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import load_task
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.tasks.task import Task
from wnn_jax.lab.training.evaluation_weights import EvaluationWeights
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

    weights = {
        "SWA": EvaluationWeights(lambda params, state: averaging.uniform_eval_params(state, params)),
        "LAWA": EvaluationWeights(lambda params, state: averaging.lawa_eval_params(state, params)),
    }
    return Method(name, with_averages, evaluation_weights=weights)


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
        Method("annealed", annealed, is_baseline=True),
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

AVERAGING = Comparison(
    task=TASK,
    methods=tuple(METHODS),
    make_task=make_task,
    base=sgd,
    own_methods=METHODS,
    learning_rates=(0.1, 0.2, 0.4, 0.8),
    own_rates={
        **dict.fromkeys(("averages", "averages-lowered", "drift"), CONSTANT_RATES),
        **dict.fromkeys(("twa-adam", "twa-4-bits", "twa-tail", "drift-twa", "twa-v"), ADAM_RATES),
        **dict.fromkeys(("twa-sgd", "twa-conference"), SGD_RATES),
    },
    search_seeds=(10,),
    num_steps=33 * EPOCH,
    evaluate_every=3 * EPOCH,
)
SHORTER = dataclasses.replace(AVERAGING, methods=("annealed", "averages", "twa-adam", "twa-tail"))

COMPARISONS = {
    "averaging": AVERAGING,
    "quarter": dataclasses.replace(SHORTER, num_steps=8 * EPOCH, evaluate_every=2 * EPOCH),
    "half": dataclasses.replace(SHORTER, num_steps=2_954, evaluate_every=3 * EPOCH),
    "double": dataclasses.replace(
        AVERAGING,
        methods=("annealed",),
        learning_rates=(0.4,),
        search_seeds=None,
        num_steps=66 * EPOCH,
        evaluate_every=6 * EPOCH,
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
