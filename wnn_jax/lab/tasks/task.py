"""The protocol of tasks: everything that determines a training run except its seed, optimizer, rate and length."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax

from wnn_jax.lab.errors import UsageError

Params = Any
ModelState = Any
Batch = Any
LossAndState = tuple[jax.Array, ModelState]
Sums = Mapping[str, tuple[jax.Array, jax.Array]]
EvaluationSplit = Literal["validation", "test"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure that a task is judged by.

    Attributes:
      name: its name in tables and result files.
      higher_is_better: the direction of progress: `True` for an accuracy, `False` for a loss.
      from_mean: makes the figure from the weighted mean of what `Task.measure` returns. For a perplexity it is the
        exponential. Of means `[classes]` it makes one figure; a class without any weight has NaN.
      format: how to write the figure, as `format(value, ...)` takes it.
    """

    name: str
    higher_is_better: bool
    from_mean: Callable[[Any], float] = float
    format: str = ".4f"

    def is_at_least(self, value: float, target: float) -> bool:
        """Return whether a value is as good as the target, or better. NaN never is."""
        return value >= target if self.higher_is_better else value <= target

    def best(self, values: Mapping[str, float]) -> str:
        """Return the name of the best value. NaN is the worst."""
        sign = 1 if self.higher_is_better else -1
        return max(values, key=lambda name: -math.inf if math.isnan(values[name]) else sign * values[name])


class Task(Protocol):
    """What is trained: data, network, loss and metrics.

    All randomness comes from the keys and seeds that the methods get, so a run can stop and resume anywhere.
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The figures that judge the task. The first one is the target of comparisons."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Describe everything that the task's results depend on, as JSON. It enters the key of every run.

        Tasks with equal descriptions must give equal results: name the data and its version, or give a checksum.
        """
        ...

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Return the parameters and the model state to start from, two trees of arrays.

        The model state maps the names of Flax collections, such as `batch_stats`, to their content, or is `{}`.
        """
        ...

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        """Return the training loss of a batch: a pure function, differentiable in `params`.

        Args:
          params: the parameters.
          model_state: the model state.
          batch: what `batch` returned.
          key: a `jax.random` key of this step, for augmentation, dropout or noise.

        Returns:
          The loss, a scalar, and the new model state.
        """
        ...

    def batch(self, seed: int, step: int) -> Batch:
        """Return the batch of a step: a tree of NumPy arrays, always the same for the same seed and step."""
        ...

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """Yield all batches of a split, each a tree of NumPy arrays. The last one may be smaller."""
        ...

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """Return a sum over an evaluation batch, and the weight of the sum, for every metric: a pure function.

        The mean over a split is the total of the sums divided by the total of the weights. The sum of an accuracy is
        the number of right answers, and its weight the number of examples. Sums and weights may also be `[classes]`.
        """
        ...


def check_task(task: Task) -> None:
    """Refuse a task without metrics, or with two metrics of one name, by a `UsageError`."""
    name = type(task).__name__
    if not task.metrics:
        raise UsageError(f"{name}.metrics is empty; name at least one Metric, the target first.")
    names = [metric.name for metric in task.metrics]
    if len(set(names)) < len(names):
        raise UsageError(f"{name}.metrics has a name twice: {', '.join(names)}; give every Metric its own name.")


def check_outputs(task: Task) -> None:
    """Refuse a task whose methods do not return what the protocol says, by a `UsageError`, before training."""
    check_task(task)
    name = type(task).__name__
    try:
        json.dumps(task.describe())
    except TypeError as error:
        raise UsageError(f"{name}.describe() cannot be written as JSON: {error}.") from error
    key = jax.random.key(0)
    params, model_state = jax.eval_shape(task.init, key)
    loss, _ = jax.eval_shape(task.loss, params, model_state, task.batch(0, 0), key)
    if loss.shape:
        raise UsageError(f"{name}.loss() has the shape {loss.shape}; return a scalar, such as the mean of these.")
    measured = jax.eval_shape(task.measure, params, model_state, next(iter(task.evaluation_batches("validation"))))
    if missing := [metric.name for metric in task.metrics if metric.name not in measured]:
        raise UsageError(f"{name}.measure() returns no {', '.join(missing)}, but {name}.metrics has it.")
    for metric in task.metrics:
        total, weight = measured[metric.name]
        if total.shape != weight.shape or (total.shape and metric.from_mean is float):
            raise UsageError(
                f"{name}.measure() returns a sum of the shape {total.shape} and a weight of {weight.shape} for "
                f"{metric.name!r}; return two scalars, or two vectors [classes] and give the Metric a from_mean."
            )
