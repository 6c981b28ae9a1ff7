"""Evaluation weights: the weights of a run, or an average of them that the optimizer's state keeps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from wnn_jax import averaging
from wnn_jax.lab.tasks.task import ModelState, Params, Task

WEIGHTS = "weights"
EMA_DECAYS = (0.99, 0.998)
# The name of a method's own optimizer in `with_moving_averages`.
OPTIMIZER = "optimizer"

# Batch statistics of averages are estimated on this many training batches, the same for all runs.
NUM_STATISTICS_BATCHES = 32
STATISTICS_SEED = 1_000_003


class EvaluationWeights(NamedTuple):
    """How to get weights to evaluate."""

    params: Callable[[Params, Any], Params]
    """`(params, opt_state) -> params`, given the state of the method's own optimizer."""
    is_average: bool = True
    """Whether no step was taken with these weights, so that their batch statistics have to be estimated."""


def from_state(eval_params: Callable[[Any, Params], Params]) -> EvaluationWeights:
    """Return the evaluation weights of a function `(opt_state, params) -> params`, as Optax has them."""
    return EvaluationWeights(lambda params, opt_state: eval_params(opt_state, params))


def with_moving_averages(tx: optax.GradientTransformation, decays: tuple[float, ...]) -> optax.GradientTransformation:
    """Chain the optimizer with exponential moving averages of the parameters."""
    averages = ((ema_name(decay), averaging.ema(decay)) for decay in decays)
    return optax.named_chain((OPTIMIZER, tx), *averages)


def all_evaluation_weights(
    own: Mapping[str, EvaluationWeights], decays: tuple[float, ...]
) -> dict[str, EvaluationWeights]:
    """Return the weights, their moving averages and the method's own, which all take the whole optimizer state."""

    def from_part(name: str, weights: EvaluationWeights) -> EvaluationWeights:
        return weights._replace(params=lambda params, opt_state: weights.params(params, opt_state[name]))

    moving_average = from_state(averaging.ema_eval_params)
    return {
        WEIGHTS: EvaluationWeights(lambda params, _: params, is_average=False),
        **{name: from_part(name, moving_average) for name in map(ema_name, decays)},
        **{name: from_part(OPTIMIZER, weights) for name, weights in own.items()},
    }


def ema_name(decay: float) -> str:
    """Return the name of a moving average in tables: `EMA .99`."""
    return f"EMA {decay:g}".replace("0.", ".")


def batch_stats_estimator(task: Task) -> Callable[[Params, ModelState], ModelState]:
    """Return `(params, model_state) -> model_state`, which estimates batch statistics. It is compiled once.

    A task without batch statistics keeps its model state.
    """

    def apply(variables: Mapping[str, Any], batch: Any, *, mutable: str) -> tuple[None, Any]:
        del mutable  # A task in training changes all of its state.
        params, model_state = variables["params"], {name: variables[name] for name in variables if name != "params"}
        return None, task.loss(params, model_state, batch, jax.random.key(0))[1]

    def estimate(params: Params, model_state: ModelState) -> ModelState:
        if not model_state or "batch_stats" not in model_state:
            return model_state
        batches = (task.batch(STATISTICS_SEED, step) for step in range(NUM_STATISTICS_BATCHES))
        variables = averaging.update_batch_stats(apply, {"params": params, **model_state}, batches)
        return {name: value for name, value in variables.items() if name != "params"}

    return estimate
