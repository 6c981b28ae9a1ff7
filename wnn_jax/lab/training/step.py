"""One step of a training: a pure function of the state, the batch and a key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wnn_jax.lab.tasks.task import Batch, ModelState, Params, Task


class TrainState(NamedTuple):
    """Everything that a training carries from step to step.

    Attributes:
      step: int32, the steps taken.
      params: what the optimizer trains.
      model_state: what the task carries beside its parameters, such as batch statistics.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Params
    model_state: ModelState
    opt_state: Any


class View:
    """What of a training's state is the network: by default, the parameters and the model state as they are.

    Some optimizers train more than one network's parameters: `optax.lookahead` a fast and a slow copy, late-phase
    weights several members. A subclass says how these begin, which of them a step is taken with, and which network they
    make in the end.
    """

    def init(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """What the optimizer begins with, from a task's own parameters and model state."""
        return params, model_state

    def read(self, state: TrainState) -> tuple[Params, ModelState]:
        """What the loss of the next step is of."""
        return state.params, state.model_state

    def write(self, state: TrainState, model_state: ModelState) -> ModelState:
        """The model state of the training, after a step that left the network that was read with `model_state`."""
        del state
        return model_state

    def network(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """One ordinary network, to be evaluated."""
        return params, model_state

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, view: View | None = None) -> TrainState:
    """The state before the first step."""
    params, model_state = (view or View()).init(*task.init(key))
    return TrainState(jnp.zeros([], jnp.int32), params, model_state, tx.init(params))


def make_step(
    task: Task, tx: optax.GradientTransformation, view: View | None = None
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Makes the step by which everything in this package is trained.

    Args:
      task: what is trained.
      tx: the optimizer.
      view: which part of the state is the network.

    Returns:
      A pure function from the state, a batch and the key of the whole training to the next state and the loss. The key
      of the step itself is made of that key and the number of the step.
    """
    view = view or View()

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        params, model_state = view.read(state)
        value_and_gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (model_state, _)), gradient = value_and_gradient(
            params, model_state, batch, jax.random.fold_in(key, state.step)
        )
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, view.write(state, model_state), opt_state), loss

    return step
