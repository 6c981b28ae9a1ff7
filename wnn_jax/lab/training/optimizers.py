"""Optimizers and learning rate schedules by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import wnn_jax
from wnn_jax.lab.errors import look_up

ScalarOrSchedule = Any
BaseOptimizer = Callable[[ScalarOrSchedule], optax.GradientTransformation]

ADAMW_WEIGHT_DECAY = 0.01


def muon(learning_rate: ScalarOrSchedule, *, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Muon for every kernel, as a matrix, and Adam for all else.

    The matrix of a convolution has a column for each output channel; that of a dense kernel with split axes is the most
    nearly square one. Optax's own rule leaves to Adam what is not of rank 2, such as the kernels of convolutions and of
    attention heads, and gives Muon the embeddings, which its author advises against.

    Args:
      learning_rate: of both.
      weight_decay: of both.

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """

    def matrix(role: str, param: Any) -> optax.contrib.MuonDimensionNumbers | None:
        shape = jnp.shape(param)
        if role not in ("conv", "dense") or len(shape) < 2:
            return None
        splits = range(1, len(shape)) if role == "dense" else (len(shape) - 1,)
        rows = min(splits, key=lambda rows: max(math.prod(shape[:rows]), math.prod(shape[rows:])))
        return optax.contrib.MuonDimensionNumbers(tuple(range(rows)), tuple(range(rows, len(shape))))

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(matrix, wnn_jax.default_roles(params), params),
    )


# Name -> optimizer, given a learning rate or a schedule of it.
BASE_OPTIMIZERS: Mapping[str, BaseOptimizer] = {
    "adam": optax.adam,
    "adamw": lambda learning_rate: optax.adamw(learning_rate, weight_decay=ADAMW_WEIGHT_DECAY),
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    "muon": muon,
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
