"""What is evaluated of a training: its weights, or an average of them that its optimizer's state keeps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from wnn_jax import averaging
from wnn_jax.lab.tasks.task import ModelState, Params, Task

EMA_DECAYS = (0.99, 0.998)

# Batch statistics are estimated anew on this many training batches, the same for all runs.
NUM_STATISTICS_BATCHES = 32
STATISTICS_SEED = 1_000_003
_BATCH_STATS = "batch_stats"


class Reading(NamedTuple):
    """A way to read the parameters of a training.

    Attributes:
      params: `(params, opt_state) -> params`, given the state of the method's own optimizer.
      is_average: whether these are weights that no step was taken with, so that batch statistics, where there are any,
        have to be estimated anew for them.
    """

    params: Callable[[Params, Any], Params]
    is_average: bool = True


WEIGHTS = "weights"


def with_moving_averages(tx: optax.GradientTransformation, decays: tuple[float, ...]) -> optax.GradientTransformation:
    """The optimizer, with exponential moving averages of the parameters kept behind it."""
    averages = ((ema_name(decay), averaging.ema(decay)) for decay in decays)
    return optax.named_chain(("optimizer", tx), *averages)


def own_state(opt_state: Any) -> Any:
    """The state of the method's own optimizer, in that of what `with_moving_averages` returned."""
    return opt_state["optimizer"]


def all_readings(readings: Mapping[str, Reading], decays: tuple[float, ...]) -> dict[str, Reading]:
    """The weights, the moving averages, and further readings, each given the whole optimizer's state."""

    def average(decay: float) -> Reading:
        name = ema_name(decay)
        return Reading(lambda params, opt_state: averaging.ema_eval_params(opt_state[name], params))

    def of_method(reading: Reading) -> Reading:
        return reading._replace(params=lambda params, opt_state: reading.params(params, own_state(opt_state)))

    return {
        WEIGHTS: Reading(lambda params, _: params, is_average=False),
        **{ema_name(decay): average(decay) for decay in decays},
        **{name: of_method(reading) for name, reading in readings.items()},
    }


def ema_name(decay: float) -> str:
    """`EMA .99`, for tables."""
    return f"EMA {decay:g}".replace("0.", ".")


class BatchStatistics:
    """Estimates the batch statistics of weights that were never trained with any."""

    def __init__(self, task: Task) -> None:
        """Remembers the task, so that all estimates share a compiled program."""
        self._task = task

    def estimate(self, params: Params, model_state: ModelState) -> ModelState:
        """The model state with statistics of these parameters; as it is where the task has none."""
        if not model_state or _BATCH_STATS not in model_state:
            return model_state
        batches = (self._task.batch(STATISTICS_SEED, step) for step in range(NUM_STATISTICS_BATCHES))
        variables = averaging.update_batch_stats(self._apply, {"params": params, **model_state}, batches)
        return {name: value for name, value in variables.items() if name != "params"}

    def _apply(self, variables: Mapping[str, Any], batch: Any, *, mutable: str) -> tuple[None, Any]:
        del mutable  # A task in training changes all of its state.
        model_state = {name: value for name, value in variables.items() if name != "params"}
        _, (model_state, _) = self._task.loss(variables["params"], model_state, batch, jax.random.key(0))
        return None, model_state
