"""What a task is: everything that determines a training but its seed, its optimizer and its learning rate."""

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
Sums = Mapping[str, tuple[jax.Array, jax.Array]]
EvaluationSplit = Literal["validation", "test"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure that a task is judged by.

    Attributes:
      name: as in tables and result files.
      higher_is_better: the direction of progress: `True` for an accuracy, `False` for a loss. A task with a metric that
        does not say is refused.
      from_mean: what makes the figure of the weighted mean of what `Task.measure` returns. The perplexity, for
        example, is the exponential of a mean cross entropy. Where that is one mean for each class, `[classes]`, it
        makes one figure of them all; a class without any weight has NaN.
      format: how to write the figure, as `format(value, ...)` takes it.
    """

    name: str
    higher_is_better: bool | None = None
    from_mean: Callable[[Any], float] = float
    format: str = ".4f"

    def is_at_least(self, value: float, target: float) -> bool:
        """Whether a value is as good as the target, or better. NaN never is."""
        return value >= target if self.higher_is_better else value <= target

    def best(self, values: Mapping[str, float]) -> str:
        """The name of the best one of some values. NaN is the worst."""
        sign = 1 if self.higher_is_better else -1
        return max(values, key=lambda name: -math.inf if math.isnan(values[name]) else sign * values[name])


class Task(Protocol):
    """A kind of training.

    A task owns neither seed, nor optimizer, nor learning rate, nor length: all of these come from who trains it. All
    of its randomness comes from the keys and seeds that it is given, so that any run can stop and go on anywhere.
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it is judged by. The first one is the target of comparisons."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on, of what JSON has: it enters the key of every run.

        Two tasks with equal descriptions give equal results: name the data and its version, or give a checksum of it.
        """
        ...

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters and model state to start from.

        Args:
          key: a `jax.random` key. A task that starts from pre-trained weights may ignore it.

        Returns:
          Trees of arrays. The model state is a mapping from the name of a Flax collection, such as `batch_stats`, to
          its content; `{}` where there is none.
        """
        ...

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The training loss of a batch: a pure function, which is differentiated by `params`.

        Args:
          params: the parameters.
          model_state: the model state.
          batch: what `batch` returned.
          key: a `jax.random` key of this step, for augmentation, dropout, or noise.

        Returns:
          The loss, a scalar, with the new model state and auxiliary scalars by name, for callers of one's own; the loop
          does not read them.
        """
        ...

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step: a tree of NumPy arrays, always the same for the same seed and step."""
        ...

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """All batches of a split, a tree of NumPy arrays each. The last one may be smaller."""
        ...

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """For every metric, the sum over an evaluation batch and the weight of the sum: a pure function.

        The mean over a split is the total of the sums over the total of the weights, for example of the number of
        right answers over the number of examples. Any other ratio of two totals will do as well, and so will one for
        each class, of sums and weights `[classes]`.
        """
        ...


def check_task(task: Task) -> None:
    """Refuses a task whose metrics cannot be compared.

    Raises:
      UsageError: if there is no metric, two have one name, or one does not say which way is better.
    """
    name = type(task).__name__
    if not task.metrics:
        raise UsageError(f"{name}.metrics is empty; name at least one Metric, the target first.")
    names = [metric.name for metric in task.metrics]
    if len(set(names)) < len(names):
        raise UsageError(f"{name}.metrics has a name twice: {', '.join(names)}; give every Metric a name of its own.")
    for metric in task.metrics:
        if not isinstance(metric.higher_is_better, bool):
            raise UsageError(
                f"{name}.metrics: {metric.name!r} has higher_is_better={metric.higher_is_better!r}; say True or False, "
                "or nobody can tell which of two runs is better."
            )


def check_outputs(task: Task) -> None:
    """Refuses a task whose methods do not return what the protocol says, before anything is trained.

    Raises:
      UsageError: names the method, what it returned and what it has to return.
    """
    name = type(task).__name__
    try:
        json.dumps(task.describe())
    except TypeError as error:
        raise UsageError(f"{name}.describe() is not of what JSON has: {error}.") from error
    key = jax.random.key(0)
    params, model_state = jax.eval_shape(task.init, key)
    loss, _ = jax.eval_shape(task.loss, params, model_state, task.batch(0, 0), key)
    if loss.shape:
        raise UsageError(f"{name}.loss() has the shape {loss.shape}; it has to be a scalar, such as the mean of these.")
    measured = jax.eval_shape(task.measure, params, model_state, next(iter(task.evaluation_batches("validation"))))
    if missing := [metric.name for metric in task.metrics if metric.name not in measured]:
        raise UsageError(f"{name}.measure() returns no {', '.join(missing)}, of which {name}.metrics has a Metric.")
    for metric in task.metrics:
        total, weight = measured[metric.name]
        if total.shape != weight.shape or (total.shape and metric.from_mean is float):
            raise UsageError(
                f"{name}.measure() returns a sum of the shape {total.shape} and a weight of {weight.shape} for "
                f"{metric.name!r}; return two scalars, or two vectors [classes] and give the Metric a from_mean."
            )
