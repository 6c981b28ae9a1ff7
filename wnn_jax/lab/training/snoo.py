"""SNOO, a rival of nowcasting: Nesterov momentum on the displacement of every few steps."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from wnn_jax._checks import check_float, check_int


class SnooState(NamedTuple):
    """State of `snoo`.

    Attributes:
      count: int32, the steps taken.
      slow: the parameters at the last synchronisation.
      momentum: the running sum of displacements, a tree like the parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    slow: Any
    momentum: Any


def snoo(period: int = 20, momentum: float = 0.5, step_size: float = 0.8) -> optax.GradientTransformation:
    r"""Takes a step of Nesterov momentum every `period` steps, along the way that the optimizer before it went.

    With the slow parameters :math:`w`, the parameters :math:`x` after the optimizer's step, :math:`\mu` = `momentum`
    and :math:`\eta` = `step_size`, every `period`-th step ends with

    .. math::
      s = w - x; \quad b \leftarrow \mu b + s; \quad w \leftarrow w - \eta (\mu b + s); \quad x \leftarrow w.

    Args:
      period: steps between synchronisations.
      momentum: what is left of the running sum after one.
      step_size: multiplies the step.

    Returns:
      A transformation with a `SnooState`. It comes last in a chain.

    Raises:
      ValueError: if an argument is out of its range.

    References:
      Kallusky et al., `SNOO: Step-K Nesterov Outer Optimizer <https://arxiv.org/abs/2510.15830>`_, 2025
    """
    check_int("period", period, "the number of steps between synchronisations", minimum=1)
    check_float("momentum", momentum, "what is left of the running sum", minimum=0.0, below=1.0)
    check_float("step_size", step_size, "the factor of the step", minimum=0.0)

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
            updates,
            state.slow,
            state.momentum,
            params,
        )
        return updates, SnooState(count, slow, total)

    return optax.GradientTransformation(init_fn, update_fn)  # pyright: ignore[reportArgumentType]
