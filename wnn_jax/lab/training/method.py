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
from wnn_jax.lab.training.step import WHOLE_STATE, TrainState, View, init_state


class StageStart(NamedTuple):
    """The beginning of a later stage: what it trains, from where, and what is evaluated.

    The parameters may differ from the parameters of the stage before. `opt_state` is `None` for a new state.
    """

    task: Task
    optimizer: optax.GradientTransformation
    params: Params
    model_state: Any
    opt_state: Any = None
    view: View = WHOLE_STATE
    evaluation_weights: Mapping[str, EvaluationWeights] = {}


class Stage(Protocol):
    """A later stage of a run, with another optimizer or other parameters.

    An implementation is a frozen dataclass. Its fields enter the key of a run.
    """

    def first_step(self, num_steps: int) -> int:
        """Return the first step of the stage in a run of `num_steps`."""
        ...

    def start(self, task: Task, state: TrainState, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Return the beginning of the stage, given the state at the end of the stage before.

        `learning_rate` is the learning rate of the method, and `num_steps` the length of the whole run.
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
    view: View = WHOLE_STATE
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
    """Begin a method with shapes alone, so that a method that does not fit the task is a `ValueError` at once."""
    optimizer = method.optimizer(learning_rate, num_steps)  # Outside of the trace, because it may read files.

    def begin(key: jax.Array) -> None:
        state = init_state(method.task(task), optimizer, key, method.view)
        for stage in method.stages[:1]:
            stage.start(task, state, learning_rate, num_steps, 0)

    # A stage that looks at values, such as checkpoints, cannot begin with shapes.
    with contextlib.suppress(jax.errors.JAXTypeError):
        jax.eval_shape(begin, jax.random.key(0))
