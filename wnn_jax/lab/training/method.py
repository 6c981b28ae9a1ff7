"""A method of a comparison: a named recipe for training."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from wnn_jax.lab.tasks.task import Params, Task
from wnn_jax.lab.training.evaluation_weights import EvaluationWeights
from wnn_jax.lab.training.keys import describe
from wnn_jax.lab.training.step import TrainState, View, init_state


class StageStart(NamedTuple):
    """The beginning of a later stage of a run.

    Attributes:
      task: what the stage trains. Its parameters may differ from those of the stage before.
      optimizer: trains it.
      params: the first parameters.
      model_state: the first model state.
      opt_state: the state of `optimizer`, or `None` for a new one.
      view: which part of the state is the network.
      evaluation_weights: what to evaluate, in addition to the weights and their moving averages.
    """

    task: Task
    optimizer: optax.GradientTransformation
    params: Params
    model_state: Any
    opt_state: Any = None
    view: View = View()
    evaluation_weights: Mapping[str, EvaluationWeights] = {}


class Stage(Protocol):
    """A later stage of a run, with another optimizer or other parameters.

    An implementation is a frozen dataclass. Its fields enter the key of a run.
    """

    def first_step(self, num_steps: int) -> int:
        """Return the first step of the stage in a run of `num_steps`."""
        ...

    def start(self, task: Task, state: TrainState, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Make the beginning of the stage from the end of the stage before.

        Args:
          task: the task of the comparison.
          state: the state at the end of the stage before, with the state of that stage's own optimizer.
          learning_rate: the learning rate of the method.
          num_steps: length of the whole run.
          seed: the seed of the run.
        """
        ...


def same_task(task: Task) -> Task:
    """Return the task itself."""
    return task


@dataclasses.dataclass(frozen=True)
class Method:
    """A named recipe for training.

    Attributes:
      name: its name in tables and plots.
      optimizer: `(learning_rate, num_steps) -> GradientTransformation`.
      settings: whatever else decides the numbers of a run, in types that JSON has. They enter the key of a run. A
        recipe whose code changes without a setting needs another `RESULTS_VERSION`.
      evaluation_weights: what to evaluate, in addition to the weights and their moving averages.
      view: which part of the state is the network.
      stages: later stages of a run.
      task: changes the task, for example to train on fewer examples.
      is_baseline: whether the method may be the reference: it uses nothing of this library.
    """

    name: str
    optimizer: Callable[[float, int], optax.GradientTransformation]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    evaluation_weights: Mapping[str, EvaluationWeights] = dataclasses.field(
        default_factory=dict[str, EvaluationWeights]
    )
    view: View = dataclasses.field(default_factory=View)
    stages: tuple[Stage, ...] = ()
    task: Callable[[Task], Task] = same_task
    is_baseline: bool = False

    def describe(self) -> dict[str, Any]:
        """Describe the method in types that JSON has: its part of a run's key."""
        description = {"name": self.name, **describe(self.settings)}
        if self.stages:
            description["stages"] = describe(self.stages)
        if self.task is not same_task:
            description["task"] = describe(self.task)
        return description


def check_method(method: Method, task: Task, learning_rate: float, num_steps: int) -> None:
    """Begin a method with shapes alone: a method that does not fit the task is a `ValueError` before it trains."""

    def begin(key: jax.Array) -> None:
        state = init_state(method.task(task), method.optimizer(learning_rate, num_steps), key, method.view)
        for stage in method.stages[:1]:
            stage.start(task, state, learning_rate, num_steps, 0)

    # A stage that looks at values, such as those of checkpoints, cannot begin with shapes.
    with contextlib.suppress(jax.errors.JAXTypeError):
        jax.eval_shape(begin, jax.random.key(0))
