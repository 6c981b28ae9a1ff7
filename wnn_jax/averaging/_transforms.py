"""Averages of the parameters, kept in the state of an Optax transformation that leaves training unchanged.

`optax.ema` averages *updates*, which changes the training. These transformations average the *parameters* after each
step. Put one last in a chain, and evaluate the weights that its `*_eval_params` returns. Parameters with a NaN or an
infinity are left out, because an average would never lose it again. `num_rejected` in the state counts them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_float, check_int
from wnn_jax._guards import add_counts
from wnn_jax._trees import all_finite, choose, wide_dtype, write_if
from wnn_jax.averaging._means import mean_of, toward


class _MeanState(NamedTuple):
    """State of an average that is one tree.

    Attributes:
      step: int32, the number of steps taken.
      num_averaged: int32, how many steps the average contains.
      average: their mean, a tree like the parameters, in float32 or wider.
      num_rejected: int32, how often the parameters were left out because they were not finite.
    """

    step: jax.Array
    num_averaged: jax.Array
    average: Any
    num_rejected: jax.Array


class UniformState(_MeanState):
    """State of `uniform`."""


class EmaState(_MeanState):
    """State of `ema`."""


class LawaState(NamedTuple):
    """State of `lawa`.

    Attributes:
      step: int32, the number of steps taken.
      num_taken: int32, the number of checkpoints taken.
      checkpoints: the latest checkpoints, trees like the parameters. Checkpoint `i` is in slot `i % size`.
      num_rejected: int32, how many checkpoints were left out because they were not finite.
    """

    step: jax.Array
    num_taken: jax.Array
    checkpoints: tuple[Any, ...]
    num_rejected: jax.Array


def uniform(start_step: int = 0, period: int = 1) -> optax.GradientTransformationExtraArgs:
    """Keep the mean of the parameters after every `period`-th step, from `start_step` on (SWA).

    Stochastic weight averaging also prescribes a learning rate: set it in your optimizer. Parameters that are not
    finite are left out, and counted in `num_rejected`.

    Args:
      start_step: the first step that counts. Steps are numbered from 0.
      period: steps between averaged parameters: steps `start_step + period - 1`, `start_step + 2 period - 1`, ...

    Returns:
      A transformation with a `UniformState`. It returns updates unchanged.

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
    add = _add_to_mean(lambda number: 1 / number)
    return _keep_average(UniformState, _wide_zeros_like, add, start_step, period)


def uniform_eval_params(state: Any, params: Any) -> Any:
    """Return the mean that `uniform` keeps, in the dtypes of `params`; or `params` while there is none.

    Args:
      state: the state of `uniform`, or of a chain that contains it.
      params: the current parameters.

    Raises:
      ValueError: if `state` contains no `UniformState`, or several.
    """
    return _read(state, UniformState, params, lambda found: found.average)


def lawa(size: int, period: int = 1, start_step: int = 0) -> optax.GradientTransformationExtraArgs:
    """Keep the latest checkpoints, to average them (LAWA).

    Args:
      size: how many checkpoints to keep. Each is a copy of the parameters.
      period: steps between checkpoints.
      start_step: the first step that counts.

    Returns:
      A transformation with a `LawaState`. It returns updates unchanged.

    Raises:
      ValueError: if an argument is out of its range; at `update`, if `params` is missing.

    References:
      Kaddour, `Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging
      <https://arxiv.org/abs/2209.14981>`_, 2022
    """
    size = check_int("size", size, "how many checkpoints to keep", minimum=1)

    def init_checkpoints(params: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(size))

    def add(checkpoints: tuple[Any, ...], new_params: Any, num_taken: jax.Array, is_added: jax.Array) -> Any:
        slot = jnp.where(is_added, num_taken % size, -1)
        return tuple(choose(slot == index, new_params, old) for index, old in enumerate(checkpoints))

    return _keep_average(LawaState, init_checkpoints, add, start_step, period)


def lawa_eval_params(state: Any, params: Any) -> Any:
    """Return the mean of the checkpoints of `lawa`, in the dtypes of `params`; or `params` while there is none.

    Args:
      state: the state of `lawa`, or of a chain that contains it.
      params: the current parameters.

    Raises:
      ValueError: if `state` contains no `LawaState`, or several.
    """

    def average(found: LawaState) -> Any:
        return jax.tree.map(lambda *leaves: mean_of(leaves, found.num_taken), *found.checkpoints)

    return _read(state, LawaState, params, average)


def ema(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters after each step.

    Args:
      decay: what is left of the average after a step, in [0, 1). The average reaches back about `1 / (1 - decay)`
        steps.

    Returns:
      A transformation with an `EmaState`. It returns updates unchanged.

    Raises:
      ValueError: if `decay` is out of its range; at `update`, if `params` is missing.
    """
    decay = check_float("decay", decay, "what is left of the average after a step", minimum=0, below=1)

    def share(number: jax.Array) -> jax.Array:
        # The weights of a mean of `number` parameters sum to `1 - decay**number` before they are normalised.
        exponent = number * math.log(decay) if decay else jnp.array(-jnp.inf, number.dtype)
        return (1 - decay) / -jnp.expm1(exponent)

    return _keep_average(EmaState, _wide_zeros_like, _add_to_mean(share), has_conditional=False)


def ema_eval_params(state: Any, params: Any) -> Any:
    """Return the unbiased average that `ema` keeps, in the dtypes of `params`; or `params` while there is none.

    Args:
      state: the state of `ema`, or of a chain that contains it.
      params: the current parameters.

    Raises:
      ValueError: if `state` contains no `EmaState`, or several.
    """
    return _read(state, EmaState, params, lambda found: found.average)


def _keep_average(
    make_state: Callable[[jax.Array, jax.Array, Any, jax.Array], Any],  # From step, num_added, memory, num_rejected.
    init_memory: Callable[[Any], Any],
    add: Callable[[Any, Any, jax.Array, jax.Array], Any],  # From memory, new_params, num_added, is_added.
    start_step: Any = 0,
    period: Any = 1,
    *,
    has_conditional: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that adds the parameters after every `period`-th step to a memory.

    `add` must not change the memory where `is_added` is false, because under `vmap` it runs for all members at once. A
    rule that needs every step is cheaper without a conditional.
    """
    start_step = check_int("start_step", start_step, "the first step that counts", minimum=0)
    period = check_int("period", period, "the number of steps from what is averaged to the next", minimum=1)

    def init_fn(params: Any) -> Any:
        # Each in a buffer of its own, to be donated.
        step, num_added, num_rejected = (jnp.zeros([], jnp.int32) for _ in range(3))
        return make_state(step, num_added, init_memory(params), num_rejected)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        new_params = optax.apply_updates(params, updates)
        step, num_added, memory, num_rejected = state
        is_due = (step >= start_step) & ((step - start_step) % period == period - 1)

        def take(memory: Any, new_params: Any) -> tuple[Any, jax.Array]:
            is_added = is_due & all_finite(new_params)
            return add(memory, new_params, num_added, is_added), is_added

        def wait(memory: Any, _: Any) -> tuple[Any, jax.Array]:
            return memory, jnp.zeros_like(is_due)

        # Training makes the new parameters anyway. It writes into the old ones, so a conditional would copy these.
        if has_conditional:
            memory, is_added = write_if(is_due, take, wait, memory, new_params)
        else:
            memory, is_added = take(memory, new_params)
        step, num_added = add_counts(step, jnp.array(1)), add_counts(num_added, is_added)
        return updates, make_state(step, num_added, memory, add_counts(num_rejected, is_due & ~is_added))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _wide_zeros_like(params: Any) -> Any:
    # A mean of many half-precision numbers would stop moving.
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf)), params)


def _add_to_mean(share: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    """Return an `add` for a mean in which the latest of `number` parameters have the share `share(number)`."""

    def add(average: Any, new_params: Any, num_averaged: jax.Array, is_added: jax.Array) -> Any:
        def add_leaf(mean: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(is_added, toward(mean, new, share(num_averaged.astype(mean.dtype) + 1)), mean)

        return jax.tree.map(add_leaf, average, new_params)

    return add


def _read(state: Any, kind: type[Any], params: Any, average: Callable[[Any], Any]) -> Any:
    """Return the average of the one state of a kind in `state`, or `params` if it is empty."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    states = [node for node in nodes if isinstance(node, kind)]
    if len(states) != 1:
        raise ValueError(
            f"state has {len(states)} of {kind.__name__}; give the state of a chain with one such average in it, or "
            "the state of the average."
        )
    _, num_added, *_ = states[0]
    return choose(num_added > 0, optax.tree.cast_like(average(states[0]), params), params)
