"""What every task must do. A test of a new kind of task is one call of `check_conformance`."""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.tasks import Task, check_task
from wnn_jax.lab.tasks.task import EvaluationSplit
from wnn_jax.lab.training.step import TrainState, init_state, make_step

SPLITS: tuple[EvaluationSplit, ...] = ("validation", "test")


def check_conformance(make_task: Callable[[], Task], *, learning_rate: float = 1e-2, num_steps: int = 30) -> None:
    """Checks a task in every way that those who train tasks rely on.

    Args:
      make_task: makes the task, twice: with batches of a few examples, so that the checks take seconds.
      learning_rate: an Adam that has this rate lowers the loss.
      num_steps: in as many steps.
    """
    task = make_task()
    check_task(task)
    check_description(task, make_task())
    initial = check_init(task)
    check_batches(task)
    check_loss(task, *initial)
    check_evaluation(task, *initial)
    training = Training(task, optax.adam(learning_rate))
    check_that_training_lowers_the_loss(training, num_steps)
    check_resume(training)
    check_seeds_together(training)


class Training:
    """A training whose step is compiled once."""

    def __init__(self, task: Task, tx: optax.GradientTransformation) -> None:
        self.task, self.tx = task, tx
        self.step = jax.jit(make_step(task, tx))
        self._init = jax.jit(functools.partial(init_state, task, tx))

    def init(self, seed: int = 0) -> TrainState:
        return self._init(jax.random.key(seed))

    def run(self, num_steps: int, *, seed: int = 0, state: TrainState | None = None) -> tuple[TrainState, list[float]]:
        """Trains from the start, or from a state, up to a step. Returns the state and the losses."""
        current: TrainState = self.init(seed) if state is None else state
        losses: list[float] = []
        for number in range(int(current.step), num_steps):
            current, loss = self.step(current, self.task.batch(seed, number), jax.random.key(seed))
            losses.append(float(loss))
        return current, losses


def check_description(task: Task, same: Task) -> None:
    description = task.describe()
    assert json.loads(json.dumps(description)) == description
    assert same.describe() == description


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
    loss, (new_state, auxiliary) = compiled(params, model_state, batch, key)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)
    assert all(np.shape(value) == () for value in auxiliary.values())
    assert abstract(new_state) == abstract(model_state)
    assert equal(new_state, model_state) == (not jax.tree.leaves(model_state)), "a model state changes in training"
    gradient, _ = jax.eval_shape(jax.grad(task.loss, has_aux=True), params, model_state, batch, key)
    assert abstract(gradient) == abstract(params)
    again, (state_again, _) = compiled(params, model_state, batch, key)
    assert_equal((again, state_again), (loss, new_state))


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
            assert total.shape == weight.shape
            assert np.isfinite(total).all()
            assert np.all(weight >= 0)
            assert np.any(weight > 0)
            assert np.isfinite(metric.from_mean(total / weight))
    whole = batches["test"][-1]
    parts = [jax.tree.map(lambda leaf, part=part: leaf[part], whole) for part in (slice(3), slice(3, None))]
    sums = [measure(params, model_state, part) for part in parts]
    assert_close(jax.tree.map(jnp.add, *sums), measure(params, model_state, whole))


def check_that_training_lowers_the_loss(training: Training, num_steps: int) -> None:
    state, losses = training.run(num_steps)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert np.mean(losses[-5:]) < np.mean(losses[:2])


def check_resume(training: Training) -> None:
    whole, _ = training.run(4)
    half, _ = training.run(2)
    saved = jax.tree.map(np.array, half)
    resumed, _ = training.run(4, state=jax.tree.map(jnp.asarray, saved))
    assert_equal(resumed, whole)


def check_seeds_together(training: Training, seeds: tuple[int, ...] = (0, 1)) -> None:
    # Traced, and not compiled once more: that every step is vectorised is JAX's business.
    step = jax.vmap(make_step(training.task, training.tx))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state = stack([training.init(seed) for seed in seeds])
    after, losses = jax.eval_shape(step, state, stack([training.task.batch(seed, 0) for seed in seeds]), keys)
    assert abstract(after) == abstract(state)
    assert losses.shape == (len(seeds),)


def target(task: Task, state: TrainState, split: EvaluationSplit = "validation") -> float:
    """The task's first metric on a split."""
    metric = task.metrics[0]
    measure = jax.jit(task.measure)
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
