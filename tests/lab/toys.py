"""Tasks of milliseconds, for tests of what trains and judges any task."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.trainer import Evaluation, Fitted, Trainer


@dataclasses.dataclass(frozen=True)
class LinearRegression:
    """A dense layer learns another one, of noisy targets."""

    noise: float = 0.1
    metrics: tuple[Metric, ...] = (Metric("mse", higher_is_better=False), Metric("close", higher_is_better=True))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "linear regression", "noise": self.noise}

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {"dense": {"kernel": jax.random.normal(key, [4, 3]), "bias": jnp.zeros(3)}}, {}

    def loss(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
        noise = self.noise * jax.random.normal(key, batch[1].shape)
        return jnp.mean((self._predict(params, batch[0], model_state) - batch[1] - noise) ** 2), model_state

    def batch(self, seed: int, step: int) -> Any:
        inputs = np.random.default_rng([seed, step]).normal(size=[16, 4]).astype(np.float32)
        return inputs, inputs @ np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

    def evaluation_batches(self, split: str) -> Iterator[Any]:
        yield from (self.batch({"validation": 100, "test": 101}[split], index) for index in range(2))

    def measure(self, params: Any, model_state: Any, batch: Any) -> Any:
        error = (self._predict(params, batch[0], model_state) - batch[1]) ** 2
        return {
            "mse": (jnp.sum(error), jnp.float32(error.size)),
            "close": (jnp.sum(error < 0.1), jnp.float32(error.size)),
        }

    def _predict(self, params: Any, inputs: Any, model_state: Any) -> Any:
        return inputs @ params["dense"]["kernel"] + params["dense"]["bias"][None]


class NormalizedRegression(LinearRegression):
    """The same behind a batch normalisation, whose statistics are the model state."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        variables = _Normalized().init(key, jnp.zeros([1, 4]), train=False)
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
        variables = {"params": params, **model_state}
        outputs, model_state = _Normalized().apply(variables, batch[0], train=True, mutable=["batch_stats"])
        return jnp.mean((outputs - batch[1]) ** 2), dict(model_state)

    def _predict(self, params: Any, inputs: Any, model_state: Any) -> Any:
        return _Normalized().apply({"params": params, **model_state}, inputs, train=False)


class _Normalized(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(5)(x))
        return nn.Dense(3)(x)


@dataclasses.dataclass(frozen=True)
class Exploding(LinearRegression):
    """Its loss is no longer finite from some step on."""

    last_step: int = 5

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "last_step": self.last_step}

    def batch(self, seed: int, step: int) -> Any:
        inputs, targets = super().batch(seed, step)
        return inputs, np.where(step < self.last_step or seed >= 100, targets, np.nan).astype(np.float32)


class Interrupted(Exception):
    """Stands for a kill between two evaluations."""


def interrupt(run: Trainer, last_step: int, folder: Path) -> None:
    """End a run right after the evaluation at a step."""

    def report(step: int, loss: float, evaluation: Evaluation | None) -> None:
        if evaluation is not None and step == last_step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.fit(0, folder, report=report, checkpoint_seconds=0.0)


def resume(run: Trainer, folder: Path, undisturbed: Fitted) -> int:
    """Finish an interrupted run, compare it with an undisturbed one, and return the step of its first evaluation."""
    steps: list[int] = []
    resumed = run.fit(0, folder, report=lambda step, _, evaluation: steps.append(step) if evaluation else None)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, undisturbed.state)
    before, after = (
        [dataclasses.replace(evaluation, seconds=0.0) for evaluation in fitted.evaluations]
        for fitted in (undisturbed, resumed)
    )
    assert before == after
    assert resumed.test == undisturbed.test
    return steps[0]


def weights_after_each_step(task: Any, tx: optax.GradientTransformation, num_steps: int) -> list[Any]:
    """Train without methods, evaluations and stages."""
    program = Program(task, tx)
    state, weights = program.init(0), []
    for stop in range(1, num_steps + 1):
        state, _, _ = program.advance(state, 0, stop)
        weights.append(jax.tree.map(np.array, state.params))
    return weights
