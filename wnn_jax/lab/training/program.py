"""The compiled training step of a task, and the loop over its steps."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, ModelState, Params, Task
from wnn_jax.lab.training.step import WHOLE_STATE, TrainState, View, init_state, make_step

_STEPS_BETWEEN_REPORTS = 25


class Program:
    """A task and its optimizer, compiled once for all seeds.

    With `scan`, `advance` runs all its steps in one `lax.scan`. It is not the default on CPU, where a convolution in a
    compiled loop is about 20 times slower.
    """

    def __init__(
        self, task: Task, tx: optax.GradientTransformation, view: View = WHOLE_STATE, *, scan: bool | None = None
    ) -> None:
        self.task, self.view, self._tx = task, view, tx
        self._step = make_step(task, tx, view)
        self._scans = jax.default_backend() != "cpu" if scan is None else scan
        self._train = jax.jit(self._scan_steps if self._scans else self._step, donate_argnums=0)
        self._measure = jax.jit(task.measure)
        self._compiled: dict[Any, Any] = {}

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return _own_buffers(init_state(self.task, self._tx, jax.random.key(seed), self.view))

    def resume(self, state: TrainState) -> TrainState:
        """Return the state with a new optimizer state."""
        return _own_buffers(state._replace(opt_state=self._tx.init(state.params)))

    def advance(
        self, state: TrainState, seed: int, stop: int, on_step: Callable[[int, float], Any] | None = None
    ) -> tuple[TrainState, float, float]:
        """Train until `stop` steps are taken in all. The buffers of `state` are donated.

        `on_step` is called now and then with the number of steps taken and the loss.

        Returns:
          The state, the mean loss of these steps, and their seconds without compilation.
        """
        key = jax.random.fold_in(jax.random.key(seed), 1)
        step, losses, seconds = int(state.step), [], 0.0
        for batches, size in self._batches(seed, step, stop):
            train = self._compile(state, batches, key)
            began = time.perf_counter()
            state, loss = train(state, batches, key)
            losses.append(loss)
            step += size
            if step == stop or (on_step and step % _STEPS_BETWEEN_REPORTS == 0):
                loss.block_until_ready()
                if on_step:
                    on_step(step, float(loss))
            seconds += time.perf_counter() - began
        return state, float(np.mean(jax.device_get(losses))), seconds

    def evaluate(self, params: Params, model_state: ModelState, split: EvaluationSplit) -> dict[str, float]:
        """Return the metrics of a network on a split."""
        batches = self.task.evaluation_batches(split)
        measured = [jax.device_get(self._measure(params, model_state, batch)) for batch in batches]
        scores = {}
        for metric in self.task.metrics:
            total, weight = np.array([sums[metric.name] for sums in measured], np.float64).sum(axis=0)
            with np.errstate(invalid="ignore"):  # NaN where a split has no weight at all for a metric or a class.
                scores[metric.name] = float(metric.from_mean(total / weight))
        return scores

    def _scan_steps(self, state: TrainState, batches: Batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        state, losses = jax.lax.scan(lambda state, batch: self._step(state, batch, key), state, batches)
        return state, losses.mean()

    def _batches(self, seed: int, start: int, stop: int) -> Iterator[tuple[Batch, int]]:
        """Yield batches one by one, or all of them stacked, with their number."""
        batches = (self.task.batch(seed, step) for step in range(start, stop))
        if self._scans:
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *batches), stop - start
        else:
            yield from ((batch, 1) for batch in batches)

    def _compile(self, state: TrainState, batch: Batch, key: jax.Array) -> Any:
        # Ahead of time, so that the seconds of a run count its steps alone.
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled[shapes] = self._train.lower(state, batch, key).compile()
        return self._compiled[shapes]


def _own_buffers(state: TrainState) -> TrainState:
    """Copy a state so that no two arrays share a buffer: a shared one cannot be donated."""
    return jax.tree.map(jnp.copy, state)
