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

    Some optimizers train more than one network. `optax.lookahead` has a fast and a slow copy, late-phase weights have
    several members. A subclass says how the copies begin, which copy takes the next step, and which network results.
    """

    def init(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """Make what the optimizer begins with from a task's own parameters and model state."""
        return params, model_state

    def read(self, state: TrainState) -> tuple[Params, ModelState]:
        """Return the network that the next step takes the loss of."""
        return state.params, state.model_state

    def write(self, state: TrainState, model_state: ModelState) -> ModelState:
        """Return the model state of the run after a step changed that of the network that was read."""
        del state
        return model_state

    def network(self, params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
        """Return one ordinary network to evaluate."""
        return params, model_state


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, view: View | None = None) -> TrainState:
    """Return the state before the first step."""
    params, model_state = (view or View()).init(*task.init(key))
    return TrainState(jnp.zeros([], jnp.int32), params, model_state, tx.init(params))


def make_step(
    task: Task, tx: optax.GradientTransformation, view: View | None = None
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array]]:
    """Make the step that trains everything in this package.

    Returns:
      A pure function from the state, a batch and the key of the run to the next state and the loss. The key of a step
      follows from the key of the run and the number of the step.
    """
    view = view or View()

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        params, model_state = view.read(state)
        value_and_gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, model_state), gradient = value_and_gradient(
            params, model_state, batch, jax.random.fold_in(key, state.step)
        )
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, view.write(state, model_state), opt_state), loss

    return step
