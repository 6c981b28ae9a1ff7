"""Optimizers and learning rate schedules by name, and the optimizers that nowcasting is compared with."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import wnn_jax

# From a learning rate or a schedule. Its `__name__` enters the key of a run.
BaseOptimizer = Callable[[Any], optax.GradientTransformation]

ADAMW_WEIGHT_DECAY = 0.01


def adamw(learning_rate: Any) -> optax.GradientTransformation:
    """Return AdamW with a weight decay of 0.01."""
    return optax.adamw(learning_rate, weight_decay=ADAMW_WEIGHT_DECAY)


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum 0.9."""
    return optax.sgd(learning_rate, momentum=0.9, nesterov=True)


def muon(learning_rate: Any, *, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return Muon for every kernel, as a matrix, and Adam for everything else.

    A convolution's matrix has one column for each output channel. A dense kernel with split axes becomes its most
    nearly square matrix. Optax's own rule leaves convolutions and attention heads to Adam, and gives Muon the
    embeddings, which its author advises against.

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


BASE_OPTIMIZERS: Mapping[str, BaseOptimizer] = {"adam": optax.adam, "adamw": adamw, "sgd": sgd, "muon": muon}


def ademamix(
    learning_rate: float, num_steps: int, *, alpha: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Return AdEMAMix whose memory is a tenth of the steps so far, at most 1,000 steps.

    The weight of its slow mean rises linearly to `alpha` over the first 30 % of the run.

    References:
      Pagliardini, Ablin, Grangier, `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_,
      ICLR 2025
    """
    return optax.contrib.ademamix(
        learning_rate,
        b3=lambda step: jnp.minimum(0.999, 1 - 1 / (11 + 0.1 * step)),
        alpha=lambda step: alpha * jnp.minimum(1.0, step / (0.3 * num_steps)),
        weight_decay=weight_decay,
    )


def schedule_free(learning_rate: float, num_steps: int, *, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Return schedule-free AdamW, warmed up over a twentieth of the run.

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024
    """
    warmup_steps = max(num_steps // 20, 1)
    return optax.contrib.schedule_free_adamw(learning_rate, warmup_steps=warmup_steps, weight_decay=weight_decay)


class SnooState(NamedTuple):
    """The number of steps taken, the slow parameters, and the running sum of displacements."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    slow: Any
    momentum: Any


def snoo(period: int = 20, momentum: float = 0.5, step_size: float = 0.8) -> optax.GradientTransformation:
    r"""Take a step of Nesterov momentum every `period` steps, along the displacement of these steps.

    With the slow parameters :math:`w`, the parameters :math:`x` after the optimizer's step, :math:`\mu` = `momentum`
    and :math:`\eta` = `step_size`, every `period`-th step ends with

    .. math::
      s = w - x; \quad b \leftarrow \mu b + s; \quad w \leftarrow w - \eta (\mu b + s); \quad x \leftarrow w.

    It comes last in a chain.

    References:
      Kallusky et al., `SNOO: Step-K Nesterov Outer Optimizer <https://arxiv.org/abs/2510.15830>`_, 2025
    """

    def init_fn(params: Any) -> SnooState:
        return SnooState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates: Any, state: SnooState, params: Any = None) -> tuple[Any, SnooState]:
        def synchronize(updates: Any, slow: Any, total: Any, params: Any) -> tuple[Any, Any, Any]:
            fast = optax.apply_updates(params, updates)
            move = jax.tree.map(jnp.subtract, slow, fast)
            total = jax.tree.map(lambda b, s: momentum * b + s, total, move)
            slow = jax.tree.map(lambda w, b, s: w - step_size * (momentum * b + s), slow, total, move)
            return jax.tree.map(jnp.subtract, slow, params), slow, total

        count = cast(jax.Array, optax.safe_increment(state.count))
        updates, slow, total = jax.lax.cond(
            count % period == 0,
            synchronize,
            lambda updates, slow, total, _: (updates, slow, total),
            *(updates, state.slow, state.momentum, params),
        )
        return updates, SnooState(count, slow, total)

    return optax.GradientTransformation(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def constant(learning_rate: float, num_steps: int) -> float:
    """Return the learning rate itself."""
    del num_steps
    return learning_rate


def warmup_stable_decay(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Return a constant learning rate that falls linearly to 0 over the last fifth of the run."""
    decay_steps = max(int(0.2 * num_steps), 1)
    decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    return optax.join_schedules([optax.constant_schedule(learning_rate), decay], [num_steps - decay_steps])


SCHEDULES: Mapping[str, Callable[[float, int], Any]] = {
    "cosine": optax.cosine_decay_schedule,
    "wsd": warmup_stable_decay,
}
