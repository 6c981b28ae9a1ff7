"""Averages of the parameters, kept in the state of an Optax transformation that leaves the training alone.

`optax.ema` averages *updates*, which changes the training; these average the *parameters* after each step, and change
nothing. Put one last in a chain, and evaluate with what its `*_eval_params` returns.

Parameters with a NaN or an infinity anywhere in them are left out, or an average would never be rid of it;
`num_rejected` in the state counts them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_float, check_int
from wnn_jax._trees import all_finite, any_member, wide_dtype
from wnn_jax.averaging._means import mean_of, toward

State = TypeVar("State", bound="UniformState | LawaState | EmaState")


class UniformState(NamedTuple):
    """State of `uniform`.

    Attributes:
      step: int32, the steps taken.
      num_averaged: int32, the parameters averaged.
      average: their mean, in float32 or wider, a tree like the parameters.
      num_rejected: int32, the parameters left out because they were not finite.
    """

    step: jax.Array
    num_averaged: jax.Array
    average: Any
    num_rejected: jax.Array


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32, the steps taken.
      num_taken: int32, the checkpoints taken.
      checkpoints: the latest of them, trees like the parameters, in no order.
      num_rejected: int32, the checkpoints left out because they were not finite.
    """

    step: jax.Array
    num_taken: jax.Array
    checkpoints: tuple[Any, ...]
    num_rejected: jax.Array


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
      num_averaged: int32, the parameters averaged.
      average: their weighted mean, in float32 or wider, a tree like the parameters.
      num_rejected: int32, the parameters left out because they were not finite.
    """

    num_averaged: jax.Array
    average: Any
    num_rejected: jax.Array


def uniform(start_step: int = 0, period: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keeps the mean of the parameters after every `period`-th step from `start_step` on.

    This is stochastic weight averaging (SWA), the learning rate being the optimizer's business. Parameters that are not
    finite are left out, and counted in `num_rejected`.

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
        return UniformState(_zero(), _zero(), _wide_zeros_like(params), _zero())

    def update_fn(updates: Any, state: UniformState, params: Any = None, **extra_args: Any) -> tuple[Any, UniformState]:
        del extra_args
        new_params = _after(params, updates)
        is_counted = _is_taken(state.step, start_step, period)

        def add(average: Any, new_params: Any) -> tuple[Any, jax.Array]:
            is_added = is_counted & all_finite(new_params)

            def share(dtype: Any) -> jax.Array:
                return 1 / (state.num_averaged.astype(dtype) + 1)

            return _add(average, new_params, share, is_added), is_added

        # The branch that writes is the one on True and returns no more than it writes: on a step that does not count
        # XLA then copies nothing. It is given the parameters after the step, which training makes anyway: were it given
        # those before, these would be copied, because training writes the new ones in their place.
        average, is_added = jax.lax.cond(
            any_member(is_counted),
            add,
            lambda average, _: (average, jnp.zeros_like(is_counted)),
            state.average,
            new_params,
        )
        num_averaged = _count(state.num_averaged, is_added)
        num_rejected = _count(state.num_rejected, is_counted & ~is_added)
        return updates, UniformState(_count(state.step), num_averaged, average, num_rejected)

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

    Parameters that are not finite are left out, and counted in `num_rejected`.

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
        return LawaState(_zero(), _zero(), checkpoints, _zero())

    def update_fn(updates: Any, state: LawaState, params: Any = None, **extra_args: Any) -> tuple[Any, LawaState]:
        del extra_args
        new_params = _after(params, updates)
        is_due = _is_taken(state.step, start_step, period)

        def take(checkpoints: tuple[Any, ...], new_params: Any) -> tuple[tuple[Any, ...], jax.Array]:
            is_taken = is_due & all_finite(new_params)
            slot = jnp.where(is_taken, state.num_taken % size, -1)
            checkpoints = tuple(
                jax.tree.map(lambda new, old, index=index: jnp.where(slot == index, new, old), new_params, checkpoint)
                for index, checkpoint in enumerate(checkpoints)
            )
            return checkpoints, is_taken

        # As in `uniform`.
        checkpoints, is_taken = jax.lax.cond(
            any_member(is_due),
            take,
            lambda checkpoints, _: (checkpoints, jnp.zeros_like(is_due)),
            state.checkpoints,
            new_params,
        )
        num_taken = _count(state.num_taken, is_taken)
        num_rejected = _count(state.num_rejected, is_due & ~is_taken)
        return updates, LawaState(_count(state.step), num_taken, checkpoints, num_rejected)

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
    # The slots are filled from the first one on.
    average = jax.tree.map(lambda *leaves: mean_of(leaves, found.num_taken), *found.checkpoints)
    return _choose(found.num_taken > 0, average, params)


def ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the parameters after each step.

    Parameters that are not finite are left out, and counted in `num_rejected`.

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
        return EmaState(_zero(), _wide_zeros_like(params), _zero())

    def update_fn(updates: Any, state: EmaState, params: Any = None, **extra_args: Any) -> tuple[Any, EmaState]:
        del extra_args
        new_params = _after(params, updates)
        is_added = all_finite(new_params)
        num_averaged = _count(state.num_averaged, is_added)

        def share(dtype: Any) -> jax.Array:
            # Of the latest in the weighted mean, whose weights sum to `1 - decay**n`.
            exponent = num_averaged.astype(dtype) * math.log(decay) if decay else jnp.array(-jnp.inf, dtype)
            return (1 - decay) / -jnp.expm1(exponent)

        average = _add(state.average, new_params, share, is_added)
        return updates, EmaState(num_averaged, average, _count(state.num_rejected, ~is_added))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def ema_eval_params(state: Any, params: Any) -> Any:
    """The exponential moving average, without bias towards zero.

    Args:
      state: the state of `ema`, or of a chain with it.
      params: the current parameters.

    Returns:
      The average in the dtypes of `params`, or `params` where nothing was averaged yet.

    Raises:
      ValueError: if there is no `EmaState`, or more than one, in `state`.
    """
    found = _find(state, EmaState)
    return _choose(found.num_averaged > 0, found.average, params)


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


def _count(number: jax.Array, is_one_more: jax.Array | bool = True) -> jax.Array:
    return jnp.where(is_one_more, cast(jax.Array, optax.safe_increment(number)), number)


def _zero() -> jax.Array:
    # For each count one of its own, so that the state can be donated.
    return jnp.zeros([], jnp.int32)


def _wide_zeros_like(params: Any) -> Any:
    # A mean of many half-precision numbers would stop moving.
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf)), params)


def _add(average: Any, new_params: Any, share: Callable[[Any], jax.Array], is_added: jax.Array) -> Any:
    """The average with a share of new parameters in it, of each leaf in its own precision; or as it is."""
    return jax.tree.map(
        lambda mean, new: jnp.where(is_added, toward(mean, new, share(mean.dtype)), mean), average, new_params
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
