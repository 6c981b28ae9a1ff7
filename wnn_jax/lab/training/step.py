"""One training step: a pure function of the state, the batch and a key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wnn_jax.lab.tasks.task import Batch, ModelState, Params, Task


class TrainState(NamedTuple):
    """Everything that a run carries from step to step.

    Attributes:
      step: int32, the number of steps taken.
      params: what the optimizer trains.
      model_state: the other collections of the network, such as batch statistics.
      opt_state: the state of the optimizer.
    """

    step: jax.Array
    params: Params
    model_state: ModelState
    opt_state: Any


class View:
    """Which part of a training state is the network. By default: the parameters and the model state.

    Some optimizers train several copies of a network. A subclass says how they begin, and which one takes a step.
    """

    def init(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """Return what the optimizer begins with."""
        return params, model_state

    def read(self, state: TrainState) -> tuple[Params, ModelState]:
        """Return the network that takes the next step."""
        return state.params, state.model_state

    def write(self, state: TrainState, model_state: ModelState) -> ModelState:
        """Return the model state of the run, given the model state of the network after its step."""
        del state
        return model_state

    def network(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """Return one ordinary network to evaluate."""
        return params, model_state


WHOLE_STATE = View()


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, view: View = WHOLE_STATE) -> TrainState:
    """Return the state before the first step."""
    params, model_state = view.init(*task.init(key))
    return TrainState(jnp.zeros([], jnp.int32), params, model_state, tx.init(params))


def make_step(
    task: Task, tx: optax.GradientTransformation, view: View = WHOLE_STATE
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Return a pure function from the state, a batch and the key of a run to the next state and the loss."""

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        params, model_state = view.read(state)
        key = jax.random.fold_in(key, state.step)
        (loss, model_state), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, model_state, batch, key)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, view.write(state, model_state), opt_state), loss

    return step
