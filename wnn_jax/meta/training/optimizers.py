"""Optimizers and learning rate schedules by name."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from wnn_jax.meta.errors import look_up

ScalarOrSchedule = Any
BaseOptimizer = Callable[[ScalarOrSchedule], optax.GradientTransformation]

ADAMW_WEIGHT_DECAY = 0.01

# Name -> optimizer, given a learning rate or a schedule of it.
BASE_OPTIMIZERS: Mapping[str, BaseOptimizer] = {
    "adam": optax.adam,
    "adamw": lambda learning_rate: optax.adamw(learning_rate, weight_decay=ADAMW_WEIGHT_DECAY),
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True),
}


def base_optimizer(name: str) -> BaseOptimizer:
    """The optimizer of a name.

    Raises:
      UsageError: if there is none.
    """
    return look_up(BASE_OPTIMIZERS, name, "--optimizer")


def constant(learning_rate: float, num_steps: int) -> float:
    """The learning rate itself."""
    del num_steps
    return learning_rate


def cosine(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Half a cosine, from the learning rate down to 0."""
    return optax.cosine_decay_schedule(learning_rate, num_steps)


def warmup_stable_decay(learning_rate: float, num_steps: int, *, decay_share: float = 0.2) -> optax.Schedule:
    """Constant, and then linear to 0 over the last fifth of the training."""
    decay_steps = max(int(decay_share * num_steps), 1)
    decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    return optax.join_schedules([optax.constant_schedule(learning_rate), decay], [num_steps - decay_steps])
