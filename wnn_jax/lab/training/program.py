"""The compiled training of a task by an optimizer, and the loop over its steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, ModelState, Params, Task
from wnn_jax.lab.training.step import TrainState, View, init_state, make_step

OnStep = Callable[[int, float], None]

_STEPS_BETWEEN_REPORTS = 25


class Program:
    """Trains a task, compiled once for all seeds."""

    def __init__(
        self,
        task: Task,
        make_optimizer: Callable[..., optax.GradientTransformation],
        view: View | None = None,
        *,
        scan: bool | None = None,
    ) -> None:
        """Prepares a program. Compilation happens at the first step.

        Args:
          task: what is trained.
          make_optimizer: makes the optimizer of the hyperparameters that `advance` is given: arrays, which can differ
            from run to run without another compilation. Often there are none.
          view: which part of the state is the network.
          scan: whether the steps of one `advance` are one `lax.scan`. Default: yes, but on CPU, where convolutions in
            a loop of the compiled program are some 20 times slower.
        """
        self.task = task
        self.view = view or View()
        self._make_optimizer = make_optimizer
        self._scans = jax.default_backend() != "cpu" if scan is None else scan
        self._train = jax.jit(self._block if self._scans else self._step, donate_argnums=0)
        self._train_together = jax.jit(jax.vmap(self._block), donate_argnums=0)
        self._measure = jax.jit(task.measure)
        self._compiled: dict[Any, Any] = {}

    def init(self, seed: int, *hyperparameters: Any) -> TrainState:
        """The state before the first step."""
        tx = self._make_optimizer(*hyperparameters)
        return _own_buffers(init_state(self.task, tx, jax.random.key(seed), self.view))

    def resume(self, state: TrainState, *hyperparameters: Any) -> TrainState:
        """A state of which only the optimizer's part is missing, completed with a new one."""
        return _own_buffers(state._replace(opt_state=self._make_optimizer(*hyperparameters).init(state.params)))

    def advance(
        self, state: TrainState, seed: int, stop: int, *hyperparameters: Any, on_step: OnStep | None = None
    ) -> tuple[TrainState, float, float]:
        """Trains until `stop` steps are taken in all.

        Args:
          state: where to begin. Its buffers are given away.
          seed: decides the batches and the keys of all steps.
          stop: the number of steps at the end, greater than those taken.
          *hyperparameters: of the optimizer.
          on_step: called with the number of steps taken and the loss, now and then.

        Returns:
          The state, the mean loss of these steps, and the seconds that they took, compilation left out.
        """
        key = _training_key(seed)
        step, losses, seconds = int(state.step), [], 0.0
        for block, size in self._blocks(seed, step, stop):
            train = self._compile(self._train, state, block, key, *hyperparameters)
            began = time.perf_counter()
            state, loss = train(state, block, key, *hyperparameters)
            losses.append(loss)
            step += size
            if step == stop or (on_step is not None and step % _STEPS_BETWEEN_REPORTS == 0):
                loss.block_until_ready()
                if on_step is not None:
                    on_step(step, float(loss))
            seconds += time.perf_counter() - began
        return state, float(np.mean(jax.device_get(losses))), seconds

    def advance_together(
        self, states: TrainState, seeds: Sequence[int], stop: int, *hyperparameters: Any
    ) -> tuple[TrainState, np.ndarray]:
        """Trains several runs at once, vectorised, with all steps in one scan: for accelerators.

        Args:
          states: of all runs, stacked: every array has one more axis in front.
          seeds: of the runs.
          stop: as for `advance`.
          *hyperparameters: of the optimizers, stacked too.

        Returns:
          The states, and the mean loss of each run.
        """
        start = int(states.step[0])
        runs = [_stack([self.task.batch(seed, step) for step in range(start, stop)]) for seed in seeds]
        keys = jnp.stack([_training_key(seed) for seed in seeds])
        states, losses = self._train_together(states, _stack(runs), keys, *hyperparameters)
        return states, np.asarray(losses)

    def evaluate(self, params: Params, model_state: ModelState, split: EvaluationSplit) -> dict[str, float]:
        """The metrics of a network on a split."""
        batches = self.task.evaluation_batches(split)
        measured = [jax.device_get(self._measure(params, model_state, batch)) for batch in batches]
        scores = {}
        for metric in self.task.metrics:
            total, weight = np.array([sums[metric.name] for sums in measured], np.float64).sum(axis=0)
            with np.errstate(invalid="ignore"):  # NaN where a split has no weight at all for a metric, or for a class.
                scores[metric.name] = float(metric.from_mean(total / weight))
        return scores

    def _step(
        self, state: TrainState, batch: Batch, key: jax.Array, *hyperparameters: Any
    ) -> tuple[TrainState, jax.Array]:
        return make_step(self.task, self._make_optimizer(*hyperparameters), self.view)(state, batch, key)

    def _block(
        self, state: TrainState, batches: Batch, key: jax.Array, *hyperparameters: Any
    ) -> tuple[TrainState, jax.Array]:
        state, losses = jax.lax.scan(
            lambda state, batch: self._step(state, batch, key, *hyperparameters), state, batches
        )
        return state, losses.mean()

    def _blocks(self, seed: int, start: int, stop: int) -> Iterator[tuple[Batch, int]]:
        """Batches one by one, or all of them stacked; and how many they are."""
        batches = (self.task.batch(seed, step) for step in range(start, stop))
        if self._scans:
            yield _stack(list(batches)), stop - start
        else:
            for batch in batches:
                yield batch, 1

    def _compile(self, function: Any, state: TrainState, batch: Batch, *arguments: Any) -> Any:
        # Ahead of time, so that the seconds of a run are those of its steps alone.
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled[shapes] = function.lower(state, batch, *arguments).compile()
        return self._compiled[shapes]


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """States of several runs as one, for `Program.advance_together`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _own_buffers(state: TrainState) -> TrainState:
    """A copy of which no two arrays share a buffer, as those of some optimizers do: it can be given away."""
    return jax.tree.map(jnp.copy, state)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _training_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 1)
