"""What a method of a comparison is: a named recipe for training."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from wnn_jax.lab.tasks.task import Params, Task
from wnn_jax.lab.training.evaluation_weights import Reading
from wnn_jax.lab.training.step import TrainState, View, init_state


class StageStart(NamedTuple):
    """What a further stage of a training begins with.

    Attributes:
      task: what it trains on. Its parameters need not be those of the stage before.
      optimizer: what trains it.
      params: parameters to begin with.
      model_state: model state to begin with.
      opt_state: of `optimizer`, or `None` for a new one.
      view: which part of the state is the network.
      readings: beside the weights and their moving averages.
    """

    task: Task
    optimizer: optax.GradientTransformation
    params: Params
    model_state: Any
    opt_state: Any = None
    view: View = View()
    readings: Mapping[str, Reading] = {}


class Stage(Protocol):
    """A further stage of a training: another optimizer, or other parameters, from some step on.

    An implementation is a frozen dataclass: its `repr` enters the key of a run.
    """

    def first_step(self, num_steps: int) -> int:
        """The first step of the stage, in a training of `num_steps`."""
        ...

    def start(self, task: Task, state: TrainState, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Makes the beginning of the stage from the end of the one before.

        Args:
          task: what the comparison trains.
          state: at the end of the stage before, with the state of that stage's own optimizer.
          learning_rate: the method's.
          num_steps: length of the whole training.
          seed: of the run.
        """
        ...


def same_task(task: Task) -> Task:
    """The task itself."""
    return task


@dataclasses.dataclass(frozen=True)
class Method:
    """A named recipe for training.

    Attributes:
      name: as in tables, plots and file names.
      optimizer: `(learning_rate, num_steps) -> GradientTransformation`.
      readings: what to evaluate beside the weights and their moving averages.
      view: which part of the state is the network.
      stages: further stages of the training.
      task: changes what is trained, for example to fewer examples where others are to be kept for later.
      nowcaster: the fingerprint of the nowcaster in it, if there is one that has any.
      is_plain: whether it may be the reference: training as it is without anything that this library is about.
    """

    name: str
    optimizer: Callable[[float, int], optax.GradientTransformation]
    readings: Mapping[str, Reading] = dataclasses.field(default_factory=dict)
    view: View = dataclasses.field(default_factory=View)
    stages: tuple[Stage, ...] = ()
    task: Callable[[Task], Task] = same_task
    nowcaster: str | None = None
    is_plain: bool = False


def check_method(method: Method, task: Task, learning_rate: float, num_steps: int) -> None:
    """Begins a method with shapes, so that one that cannot train a task is refused before anything is trained.

    Args:
      method: how to train.
      task: what to train.
      learning_rate: given to the method.
      num_steps: given to the method.

    Raises:
      ValueError: if the optimizer does not take the task's parameters, or a second stage cannot begin with them.
    """

    def begin(key: jax.Array) -> None:
        state = init_state(method.task(task), method.optimizer(learning_rate, num_steps), key, method.view)
        for stage in method.stages[:1]:
            stage.start(task, state, learning_rate, num_steps, 0)

    # A stage that looks at values, such as those of checkpoints, can only begin with them.
    with contextlib.suppress(jax.errors.JAXTypeError):
        jax.eval_shape(begin, jax.random.key(0))
