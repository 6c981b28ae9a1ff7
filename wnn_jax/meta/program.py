"""Training the networks of tasks, keeping their weights over time."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.meta.architectures import ARCHITECTURES
from wnn_jax.meta.datasets import Dataset
from wnn_jax.meta.tasks import OptimizerName, Task


class TrainState(NamedTuple):
    """What a run carries from step to step."""

    step: jax.Array
    params: Any
    opt_state: Any


class Rate(NamedTuple):
    """What the tasks of one compiled program can differ in: the learning rate, and the share of it at the end."""

    initial: jax.Array
    final_share: jax.Array


class Program:
    """The compiled training of all tasks that differ in seed and learning rate only."""

    def __init__(self, task: Task, dataset: Dataset) -> None:
        self._task = task.program
        self._dataset = dataset
        self._model = ARCHITECTURES[task.architecture](dataset.num_classes)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._block = jax.jit(jax.vmap(self._train_block, in_axes=(0, None, None, 0, 0)), donate_argnums=0)
        self._evaluate = jax.jit(self._loss)

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        inputs = self._dataset.preprocess(self._dataset.train.inputs[:1])
        params = self._model.init(jax.random.key(seed), inputs)["params"]
        return TrainState(jnp.zeros([], jnp.int32), params, self._optimizer(self._rate(self._task)).init(params))

    def run(self, task: Task) -> Iterator[tuple[Any, float]]:
        """Trains step by step: convolutions inside a loop of a compiled program are slow on CPU.

        Args:
          task: a task of this program.

        Yields:
          After every `snapshot_every` steps, the parameters and the mean training loss since the last time.
        """
        state, rate = self.init(task.seed), self._rate(task)
        inputs, targets = map(jnp.asarray, self._dataset.train)
        losses: list[jax.Array] = []
        for step, indices in enumerate(self._batches(task), 1):
            state, loss = self._step(state, inputs, targets, indices, rate)
            losses.append(loss)
            if step % task.snapshot_every == 0:
                yield _on_host(state.params), float(jnp.stack(losses).mean())
                losses.clear()

    def run_together(self, tasks: Sequence[Task]) -> Iterator[tuple[Any, np.ndarray]]:
        """Trains several tasks of this program at once, vectorised, with the steps between snapshots in one scan.

        Yields:
          As `run`, with one more axis, of the tasks, in front.
        """
        states = [self.init(task.seed) for task in tasks]
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        rate = Rate(*(jnp.stack(values) for values in zip(*map(self._rate, tasks), strict=True)))
        inputs, targets = map(jnp.asarray, self._dataset.train)
        batches = [self._batches(task) for task in tasks]
        every = self._task.snapshot_every
        for _ in range(self._task.num_steps // every):
            block = np.stack([[next(steps) for _ in range(every)] for steps in batches])
            state, losses = self._block(state, inputs, targets, block, rate)
            yield _on_host(state.params), np.asarray(losses)

    def validation_loss(self, params: Any, *, max_examples: int = 1_000) -> float:
        """The loss on the first validation examples."""
        inputs, targets = (jnp.asarray(part[:max_examples]) for part in self._dataset.validation)
        return float(self._evaluate(params, inputs, targets))

    def _train_step(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array, indices: jax.Array, rate: Rate
    ) -> tuple[TrainState, jax.Array]:
        loss, gradient = jax.value_and_grad(self._loss)(state.params, inputs[indices], targets[indices])
        updates, opt_state = self._optimizer(rate).update(gradient, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

    def _train_block(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array, block: jax.Array, rate: Rate
    ) -> tuple[TrainState, jax.Array]:
        state, losses = jax.lax.scan(
            lambda state, indices: self._train_step(state, inputs, targets, indices, rate), state, block
        )
        return state, losses.mean()

    def _loss(self, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = self._model.apply({"params": params}, self._dataset.preprocess(inputs))
        assert isinstance(logits, jax.Array)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def _optimizer(self, rate: Rate) -> optax.GradientTransformation:
        def schedule(step: Any) -> jax.Array:
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / self._task.num_steps, 1.0)))
            return rate.initial * (rate.final_share + (1 - rate.final_share) * cosine)

        return make_optimizer(self._task.optimizer, schedule)

    def _rate(self, task: Task) -> Rate:
        return Rate(jnp.float32(task.learning_rate), jnp.float32(task.final_learning_rate))

    def _batches(self, task: Task) -> Iterator[np.ndarray]:
        """The indices of each step's examples: epoch after epoch, each in an order of its own."""
        count = len(self._dataset.train.targets)
        per_epoch = count // task.batch_size
        for step in range(task.num_steps):
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = np.random.default_rng([task.seed, epoch]).permutation(count).astype(np.int32)
            yield order[position * task.batch_size : (position + 1) * task.batch_size]  # pyright: ignore[reportPossiblyUnboundVariable]


def _on_host(params: Any) -> Any:
    """A copy: the next step takes over the buffers of these."""
    return jax.tree.map(np.array, params)


def make_optimizer(name: OptimizerName, learning_rate: Any) -> optax.GradientTransformation:
    """The optimizer of a task."""
    if name == "adam":
        return optax.adam(learning_rate)
    if name == "adamw":
        return optax.adamw(learning_rate, weight_decay=0.01)
    return optax.sgd(learning_rate, momentum=0.9)
