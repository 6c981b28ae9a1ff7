"""What an arm of a comparison is: a named recipe for training."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from wnn_jax.meta.tasks.task import Params, Task
from wnn_jax.meta.training.readings import Reading
from wnn_jax.meta.training.step import TrainState, View, init_state


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
          learning_rate: the arm's.
          num_steps: length of the whole training.
          seed: of the run.
        """
        ...


def same_task(task: Task) -> Task:
    """The task itself."""
    return task


@dataclasses.dataclass(frozen=True)
class Arm:
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


def check_arm(arm: Arm, task: Task, learning_rate: float, num_steps: int) -> None:
    """Begins an arm with shapes, so that one that cannot train a task is refused before anything is trained.

    Args:
      arm: how to train.
      task: what to train.
      learning_rate: given to the arm.
      num_steps: given to the arm.

    Raises:
      ValueError: if the optimizer does not take the task's parameters, or a second stage cannot begin with them.
    """

    def begin(key: jax.Array) -> None:
        state = init_state(arm.task(task), arm.optimizer(learning_rate, num_steps), key, arm.view)
        for stage in arm.stages[:1]:
            stage.start(task, state, learning_rate, num_steps, 0)

    # A stage that looks at values, such as those of checkpoints, can only begin with them.
    with contextlib.suppress(jax.errors.JAXTypeError):
        jax.eval_shape(begin, jax.random.key(0))
