"""What every task must do. The test of a new kind of task is one call of `check_conformance`."""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.tasks import Task
from wnn_jax.lab.tasks.task import EvaluationSplit, check_outputs
from wnn_jax.lab.training.step import TrainState, init_state, make_step

SPLITS: tuple[EvaluationSplit, ...] = ("validation", "test")


def check_conformance(make_task: Callable[[], Task], *, learning_rate: float = 1e-2, num_steps: int = 30) -> None:
    """Check everything that training relies on, also that Adam lowers the loss in so many steps.

    `make_task` is called twice. Give it batches of a few examples, so that the checks take seconds.
    """
    task = make_task()
    check_outputs(task)
    description = task.describe()
    assert json.loads(json.dumps(description)) == description
    assert make_task().describe() == description
    training = Training(task, optax.adam(learning_rate))
    initial = check_init(task)
    check_batches(task)
    check_loss(task, *initial)
    check_evaluation(task, *initial)
    check_training(training, num_steps)


class Training:
    """A training run whose step is compiled once."""

    def __init__(self, task: Task, tx: optax.GradientTransformation) -> None:
        self.task, self.tx = task, tx
        self.step = jax.jit(make_step(task, tx))
        self._init = jax.jit(functools.partial(init_state, task, tx))

    def init(self, seed: int = 0) -> TrainState:
        return self._init(jax.random.key(seed))

    def run(self, num_steps: int, *, seed: int = 0, state: TrainState | None = None) -> tuple[TrainState, list[float]]:
        """Train from the start, or from a state, up to a step. Return the state and the losses."""
        current: TrainState = self.init(seed) if state is None else state
        losses: list[float] = []
        for number in range(int(current.step), num_steps):
            current, loss = self.step(current, self.task.batch(seed, number), jax.random.key(seed))
            losses.append(float(loss))
        return current, losses


def check_init(task: Task) -> tuple[Any, Any]:
    # Compiled: operation by operation it would take most of the time of these checks.
    init = jax.jit(task.init)
    params, model_state = init(jax.random.key(0))
    assert jax.tree.leaves(params)
    assert isinstance(model_state, dict)
    assert_equal(init(jax.random.key(0)), (params, model_state))
    return params, model_state


def check_batches(task: Task) -> None:
    first = task.batch(0, 0)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first))
    for seed, step in ((0, 1), (0, 1_000), (1, 0)):
        other = task.batch(seed, step)
        assert abstract(other) == abstract(first)
        assert not equal(other, first), f"the batch of seed {seed} and step {step} is the batch of seed 0 and step 0"
        assert_equal(task.batch(seed, step), other)
    assert_equal(task.batch(0, 0), first)


def check_loss(task: Task, params: Any, model_state: Any) -> None:
    batch, key = task.batch(0, 0), jax.random.key(1)
    compiled = jax.jit(task.loss)
    loss, new_state = compiled(params, model_state, batch, key)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert np.isfinite(loss)
    assert abstract(new_state) == abstract(model_state)
    assert equal(new_state, model_state) == (not jax.tree.leaves(model_state)), "a model state changes in training"
    gradient, _ = jax.eval_shape(jax.grad(task.loss, has_aux=True), params, model_state, batch, key)
    assert abstract(gradient) == abstract(params)
    assert_equal(compiled(params, model_state, batch, key)[:1], (loss,))


def check_evaluation(task: Task, params: Any, model_state: Any) -> None:
    measure = jax.jit(task.measure)
    batches = {split: list(task.evaluation_batches(split)) for split in SPLITS}
    assert not equal(batches["validation"][0], batches["test"][0]), "both splits are the same"
    for split in SPLITS:
        for batch, again in zip(batches[split], task.evaluation_batches(split), strict=True):
            assert_equal(again, batch)
        sums = measure(params, model_state, batches[split][-1])
        assert set(sums) == {metric.name for metric in task.metrics}
        for metric in task.metrics:
            total, weight = sums[metric.name]
            assert np.isfinite(total).all()
            assert np.all(weight >= 0)
            assert np.any(weight > 0)
            assert np.isfinite(metric.from_mean(total / weight))
    whole = batches["test"][-1]
    parts = [jax.tree.map(lambda leaf, part=part: leaf[part], whole) for part in (slice(3), slice(3, None))]
    sums = [measure(params, model_state, part) for part in parts]
    assert_close(jax.tree.map(jnp.add, *sums), measure(params, model_state, whole))


def check_training(training: Training, num_steps: int) -> None:
    state, losses = training.run(num_steps)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert np.mean(losses[-5:]) < np.mean(losses[:2]), "training does not lower the loss"
    saved = jax.tree.map(np.array, training.run(2)[0])
    resumed, _ = training.run(4, state=jax.tree.map(jnp.asarray, saved))
    assert_equal(resumed, training.run(4)[0])
    # Two seeds together. Traced only: JAX makes sure that every step is vectorised.
    step, keys = jax.vmap(make_step(training.task, training.tx)), jax.vmap(jax.random.key)(jnp.arange(2))
    states = stack([training.init(seed) for seed in range(2)])
    after, losses = jax.eval_shape(step, states, stack([training.task.batch(seed, 0) for seed in range(2)]), keys)
    assert abstract(after) == abstract(states)
    assert losses.shape == (2,)


def target(task: Task, state: TrainState, split: EvaluationSplit = "validation") -> float:
    """The task's first metric on a split."""
    metric, measure = task.metrics[0], jax.jit(task.measure)
    sums = [measure(state.params, state.model_state, batch)[metric.name] for batch in task.evaluation_batches(split)]
    total, weight = map(sum, zip(*sums, strict=True))
    return metric.from_mean(total / weight)


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def abstract(tree: Any) -> Any:
    """Structure, shapes and types."""
    leaves = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def equal(first: Any, second: Any) -> bool:
    pairs = itertools.zip_longest(jax.tree.leaves(first), jax.tree.leaves(second))
    return all(np.array_equal(x, y) for x, y in pairs)


def assert_equal(actual: Any, expected: Any) -> None:
    assert abstract(actual) == abstract(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Any, expected: Any) -> None:
    assert abstract(actual) == abstract(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), actual, expected)
