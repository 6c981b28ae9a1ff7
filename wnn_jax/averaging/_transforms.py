"""Averages of the parameters, kept in the state of an Optax transformation that leaves the training alone.

`optax.ema` averages *updates*, which changes the training; these average the *parameters* after each step, and change
nothing. Put one last in a chain, and evaluate with what its `*_eval_params` returns.
"""

from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_float, check_int
from wnn_jax._conditionals import any_member

State = TypeVar("State", bound="UniformState | LawaState | EmaState")


class UniformState(NamedTuple):
    """State of `uniform`.

    Attributes:
      step: int32, the steps taken.
      num_averaged: int32, the parameters averaged.
      average: their mean, in float32 or wider, a tree like the parameters.
    """

    step: jax.Array
    num_averaged: jax.Array
    average: Any


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32, the steps taken.
      num_taken: int32, the checkpoints taken.
      checkpoints: the latest of them, trees like the parameters, in no order.
    """

    step: jax.Array
    num_taken: jax.Array
    checkpoints: tuple[Any, ...]


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
      step: int32, the steps taken.
      average: the weighted sum, in float32 or wider, a tree like the parameters; its weights sum to
        `1 - decay**step`.
      weight: float32, what its weights sum to.
    """

    step: jax.Array
    average: Any
    weight: jax.Array


def uniform(start_step: int = 0, period: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keeps the mean of the parameters after every `period`-th step from `start_step` on.

    This is stochastic weight averaging (SWA), the learning rate being the optimizer's business.

    Args:
      start_step: the first step that counts. Steps are numbered from 0.
      period: steps between what is averaged: steps `start_step + period - 1`, `start_step + 2 period - 1`, ...

    Returns:
      A transformation with a `UniformState`, which passes updates on as they are.

    Raises:
      ValueError: if an argument is out of its range; at `update`, if `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from wnn_jax import averaging
      >>> tx = optax.chain(optax.sgd(1.0), averaging.uniform())
      >>> params = {"w": jnp.array(0.0)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"w": jnp.array(-1.0)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> averaging.uniform_eval_params(state, params)["w"].item()  # of 1, 2 and 3
      2.0

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
      <https://arxiv.org/abs/1803.05407>`_, UAI 2018
    """
    start_step, period = _check_start_and_period(start_step, period)

    def init_fn(params: Any) -> UniformState:
        zero = jnp.zeros([], jnp.int32)
        return UniformState(zero, jnp.zeros([], jnp.int32), _wide_zeros_like(params))

    def update_fn(updates: Any, state: UniformState, params: Any = None, **extra_args: Any) -> tuple[Any, UniformState]:
        del extra_args
        new_params = _after(params, updates)
        is_counted = _is_taken(state.step, start_step, period)
        num_averaged = state.num_averaged + is_counted

        def add(average: Any, new_params: Any) -> Any:
            share = 1 / jnp.maximum(num_averaged, 1)

            def add_leaf(mean: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.where(is_counted, mean + share.astype(mean.dtype) * (new - mean), mean)

            return jax.tree.map(add_leaf, average, new_params)

        # The branch that writes is the one on True and returns no more than it writes: on a step that does not count
        # XLA then copies nothing. It is given the parameters after the step, which training makes anyway: were it given
        # those before, these would be copied, because training writes the new ones in their place.
        average = jax.lax.cond(any_member(is_counted), add, lambda average, _: average, state.average, new_params)
        return updates, UniformState(_next(state.step), num_averaged, average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def uniform_eval_params(state: Any, params: Any) -> Any:
    """The uniform average.

    Args:
      state: the state of `uniform`, or of a chain with it.
      params: the current parameters.

    Returns:
      The average in the dtypes of `params`, or `params` where nothing was averaged yet.

    Raises:
      ValueError: if there is no `UniformState`, or more than one, in `state`.
    """
    found = _find(state, UniformState)
    return _choose(found.num_averaged > 0, found.average, params)


def lawa(size: int, period: int = 1, start_step: int = 0) -> optax.GradientTransformationExtraArgs:
    """Keeps the latest checkpoints, for the average of them (LAWA).

    Args:
      size: how many checkpoints to keep: as many copies of the parameters.
      period: steps between checkpoints.
      start_step: the first step that counts.

    Returns:
      A transformation with a `LawaState`, which passes updates on as they are.

    Raises:
      ValueError: if an argument is out of its range; at `update`, if `params` is missing.

    References:
      Kaddour, `Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging
      <https://arxiv.org/abs/2209.14981>`_, 2022
    """
    size = check_int("size", size, "how many checkpoints to keep", minimum=1)
    start_step, period = _check_start_and_period(start_step, period)

    def init_fn(params: Any) -> LawaState:
        checkpoints = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(size))
        return LawaState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), checkpoints)

    def update_fn(updates: Any, state: LawaState, params: Any = None, **extra_args: Any) -> tuple[Any, LawaState]:
        del extra_args
        new_params = _after(params, updates)
        is_taken = _is_taken(state.step, start_step, period)
        slot = jnp.where(is_taken, state.num_taken % size, -1)

        def take(checkpoints: tuple[Any, ...], new_params: Any) -> tuple[Any, ...]:
            return tuple(
                jax.tree.map(lambda new, old, index=index: jnp.where(slot == index, new, old), new_params, checkpoint)
                for index, checkpoint in enumerate(checkpoints)
            )

        # As in `uniform`.
        checkpoints = jax.lax.cond(
            any_member(is_taken), take, lambda checkpoints, _: checkpoints, state.checkpoints, new_params
        )
        return updates, LawaState(_next(state.step), state.num_taken + is_taken, checkpoints)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def lawa_eval_params(state: Any, params: Any) -> Any:
    """The mean of the latest checkpoints.

    Args:
      state: the state of `lawa`, or of a chain with it.
      params: the current parameters.

    Returns:
      The average of those taken, up to `size`, in the dtypes of `params`; or `params` where there are none yet.

    Raises:
      ValueError: if there is no `LawaState`, or more than one, in `state`.
    """
    found = _find(state, LawaState)
    number = jnp.minimum(found.num_taken, len(found.checkpoints))

    def mean(*leaves: jax.Array) -> jax.Array:
        # Slots that were never written are zero.
        dtype = jnp.promote_types(leaves[0].dtype, jnp.float32)
        return sum(leaf.astype(dtype) for leaf in leaves) / jnp.maximum(number, 1).astype(dtype)

    return _choose(number > 0, jax.tree.map(mean, *found.checkpoints), params)


def ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters after each step.

    Args:
      decay: what is left of the average after a step, in [0, 1). The average reaches back about `1 / (1 - decay)`
        steps.

    Returns:
      A transformation with an `EmaState`, which passes updates on as they are.

    Raises:
      ValueError: if `decay` is out of its range; at `update`, if `params` is missing.
    """
    decay = check_float("decay", decay, "what is left of the average after a step", minimum=0, below=1)

    def init_fn(params: Any) -> EmaState:
        return EmaState(jnp.zeros([], jnp.int32), _wide_zeros_like(params), jnp.zeros([], jnp.float32))

    def update_fn(updates: Any, state: EmaState, params: Any = None, **extra_args: Any) -> tuple[Any, EmaState]:
        del extra_args
        average = jax.tree.map(
            lambda mean, new: decay * mean + (1 - decay) * new.astype(mean.dtype),
            state.average,
            _after(params, updates),
        )
        return updates, EmaState(_next(state.step), average, decay * state.weight + (1 - decay))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def ema_eval_params(state: Any, params: Any) -> Any:
    """The exponential moving average, without bias towards zero.

    Args:
      state: the state of `ema`, or of a chain with it.
      params: the current parameters.

    Returns:
      The average in the dtypes of `params`, or `params` where no step was taken yet.

    Raises:
      ValueError: if there is no `EmaState`, or more than one, in `state`.
    """
    found = _find(state, EmaState)
    weight = jnp.where(found.step > 0, found.weight, 1.0)
    return _choose(found.step > 0, jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), found.average), params)


def _after(params: Any, updates: Any) -> Any:
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return optax.apply_updates(params, updates)


def _check_start_and_period(start_step: Any, period: Any) -> tuple[int, int]:
    return (
        check_int("start_step", start_step, "the first step that counts", minimum=0),
        check_int("period", period, "the number of steps from what is averaged to the next", minimum=1),
    )


def _is_taken(step: jax.Array, start_step: int, period: int) -> jax.Array:
    return (step >= start_step) & ((step - start_step) % period == period - 1)


def _next(step: jax.Array) -> jax.Array:
    return cast(jax.Array, optax.safe_increment(step))


def _wide_zeros_like(params: Any) -> Any:
    # A mean of many half-precision numbers would stop moving.
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, dtype=jnp.promote_types(jnp.result_type(leaf), jnp.float32)), params
    )


def _choose(condition: jax.Array, average: Any, params: Any) -> Any:
    return jax.tree.map(lambda mean, param: jnp.where(condition, mean.astype(param.dtype), param), average, params)


def _find(state: Any, kind: type[State]) -> State:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    if len(found) != 1:
        raise ValueError(
            f"state has {len(found)} of {kind.__name__}; give the state of a chain with one such average in it, or the "
            "state of that one."
        )
    return found[0]
