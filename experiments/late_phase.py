"""Late-phase weights on a residual network, compared with annealed SGD, SWA and nowcasts.

    python -m experiments.late_phase --data-dir DIR

The record is `late_phase.md`. All methods take as many minibatches.
"""

import operator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from experiments.averaging import annealed, sgd, warmed_up
from wnn_jax import averaging
from wnn_jax.lab.comparing.calibration import Calibration
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison
from wnn_jax.lab.tasks import Task, check_data
from wnn_jax.lab.tasks.data import load_images, random_mirror
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.training.evaluation_weights import EvaluationWeights
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainMembers
from wnn_jax.late_phase import module_mask, norm_mask

FIRST = 0.6
EPOCH = 60
BATCH_SIZE = 128
NUM_OUTLIERS = 2_000
MODEL = ResNet(features=(8, 16, 32), stem_strides=2)


def in_cycles(schedule: Any, first_cycle: int, cycle: int) -> Any:
    """A schedule for an optimizer that from `first_cycle` on takes one step in `cycle` minibatches."""
    return lambda count: schedule(count + (cycle - 1) * jnp.maximum(count - first_cycle, 0))


def annealed_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `annealed`, by minibatches."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 8, num_steps)
    return sgd(in_cycles(schedule, first_cycle, cycle))


def constant_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `constant`, by minibatches."""
    return sgd(in_cycles(warmed_up(learning_rate, num_steps), first_cycle, cycle))


def drifting_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `annealed_in_cycles`, followed by the drift: of shared weights, and of each member's own."""
    return optax.chain(annealed_in_cycles(learning_rate, num_steps, first_cycle, cycle), wnn_jax.nowcast())


def begun_by(in_cycles: Any) -> Any:
    """The optimizer of the stage before, of which every step is a minibatch."""
    return lambda learning_rate, num_steps: in_cycles(learning_rate, num_steps, num_steps, 1)


def with_average(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """At a constant rate, averaged once an epoch from where late-phase weights begin."""
    average = averaging.uniform(round(FIRST * num_steps), EPOCH)
    return optax.chain(sgd(warmed_up(learning_rate, num_steps)), average)


def last_layer(params: Any) -> Any:
    """The mask of the classifier."""
    return module_mask(params, "Dense_0")


def norms_and_last_layer(params: Any) -> Any:
    """The mask of all batch normalisation and of the classifier."""
    return jax.tree.map(operator.or_, norm_mask(params), last_layer(params))


def late_phase_method(name: str, optimizer: Any, num_members: int = 5, **options: Any) -> Method:
    """A method with late-phase weights."""
    return Method(name, begun_by(optimizer), stages=(TrainMembers(optimizer, FIRST, num_members, **options),))


METHODS = {
    method.name: method
    for method in (
        Method("annealed", annealed, is_baseline=True),
        Method(
            "swa",
            with_average,
            evaluation_weights={
                "SWA": EvaluationWeights(lambda params, state: averaging.uniform_eval_params(state, params))
            },
        ),
        late_phase_method("late-phase", annealed_in_cycles),
        late_phase_method("late-phase-10", annealed_in_cycles, 10),
        late_phase_method("late-phase-last-layer", annealed_in_cycles, mask=last_layer),
        late_phase_method("late-phase-10-both", annealed_in_cycles, 10, mask=norms_and_last_layer),
        late_phase_method("late-phase-swa", constant_in_cycles, average_every=EPOCH),
        late_phase_method("late-phase-ensemble", annealed_in_cycles, ensemble=True),
        Method("drift", begun_by(drifting_in_cycles)),
        late_phase_method("drift-late-phase", drifting_in_cycles),
    )
}


def make_task(data_dir: Path, model: nn.Module = MODEL) -> Task:
    """CIFAR-10 at 16x16 with so few images that an epoch has 60 minibatches; outliers are MNIST's digits."""
    check_data(("cifar10-16", "mnist-14"), data_dir)
    digits = load_images("mnist-14", data_dir)
    outliers = {
        split: np.pad(images[:NUM_OUTLIERS], [(0, 0), (1, 1), (1, 1), (0, 0)]).repeat(3, axis=-1)
        for split, images in (("validation", digits.validation.images), ("test", digits.test.images))
    }
    return Calibration.load(
        data_dir,
        dataset="cifar10-16",
        model=model,
        batch_size=BATCH_SIZE,
        augment=random_mirror,
        outliers=outliers,
    ).with_training_examples(slice(EPOCH * BATCH_SIZE))


LATE_PHASE = Comparison(
    task="cifar10-16-resnet",
    methods=tuple(METHODS),
    make_task=make_task,
    base=sgd,
    own_methods=METHODS,
    learning_rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    search_seeds=(10,),
    seeds=(0, 1, 2, 3, 4),
    num_steps=30 * EPOCH,
    evaluate_every=6 * EPOCH,
)

COMPARISONS = {"late-phase": LATE_PHASE}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
