"""What is evaluated of a run: its weights, or an average of them that the optimizer's state keeps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from wnn_jax import averaging
from wnn_jax.lab.tasks.task import ModelState, Params, Task

WEIGHTS = "weights"
EMA_DECAYS = (0.99, 0.998)

# Batch statistics of averages are estimated on this many training batches, the same for all runs.
NUM_STATISTICS_BATCHES = 32
STATISTICS_SEED = 1_000_003


class EvaluationWeights(NamedTuple):
    """How to get the weights to evaluate.

    Attributes:
      params: `(params, opt_state) -> params`, given the state of the method's own optimizer.
      is_average: whether no step was taken with these weights, so that their batch statistics have to be estimated.
    """

    params: Callable[[Params, Any], Params]
    is_average: bool = True


def with_moving_averages(tx: optax.GradientTransformation, decays: tuple[float, ...]) -> optax.GradientTransformation:
    """Chain the optimizer with exponential moving averages of the parameters."""
    averages = ((ema_name(decay), averaging.ema(decay)) for decay in decays)
    return optax.named_chain(("optimizer", tx), *averages)


def own_state(opt_state: Any) -> Any:
    """Return the state of the method's own optimizer from a state of `with_moving_averages`."""
    return opt_state["optimizer"]


def all_evaluation_weights(
    own: Mapping[str, EvaluationWeights], decays: tuple[float, ...]
) -> dict[str, EvaluationWeights]:
    """Return the weights, the moving averages and the method's own, each given the whole optimizer state."""

    def moving_average(name: str) -> EvaluationWeights:
        return EvaluationWeights(lambda params, opt_state: averaging.ema_eval_params(opt_state[name], params))

    def of_method(weights: EvaluationWeights) -> EvaluationWeights:
        return weights._replace(params=lambda params, opt_state: weights.params(params, own_state(opt_state)))

    return {
        WEIGHTS: EvaluationWeights(lambda params, _: params, is_average=False),
        **{ema_name(decay): moving_average(ema_name(decay)) for decay in decays},
        **{name: of_method(weights) for name, weights in own.items()},
    }


def ema_name(decay: float) -> str:
    """Return the name of a moving average in tables: `EMA .99`."""
    return f"EMA {decay:g}".replace("0.", ".")


def batch_stats_estimator(task: Task) -> Callable[[Params, ModelState], ModelState]:
    """Make a function that estimates the batch statistics of weights, compiled once for all of them.

    Returns:
      `(params, model_state) -> model_state`. A task without batch statistics keeps its model state.
    """

    def apply(variables: Mapping[str, Any], batch: Any, *, mutable: str) -> tuple[None, Any]:
        del mutable  # A task in training changes all of its state.
        model_state = {name: value for name, value in variables.items() if name != "params"}
        _, model_state = task.loss(variables["params"], model_state, batch, jax.random.key(0))
        return None, model_state

    def estimate(params: Params, model_state: ModelState) -> ModelState:
        if not model_state or "batch_stats" not in model_state:
            return model_state
        batches = (task.batch(STATISTICS_SEED, step) for step in range(NUM_STATISTICS_BATCHES))
        variables = averaging.update_batch_stats(apply, {"params": params, **model_state}, batches)
        return {name: value for name, value in variables.items() if name != "params"}

    return estimate
