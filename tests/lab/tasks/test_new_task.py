"""How little a new kind of task needs: the class, and one call of the conformance check."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.lab.tasks.conformance import check_conformance
from wnn_jax.lab.tasks import Metric


class LinearRegression:
    metrics = (Metric("mse", higher_is_better=False),)

    def describe(self) -> dict[str, Any]:
        return {"kind": "linear regression"}

    def init(self, key: Any) -> Any:
        return {"slope": jnp.zeros([])}, {}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return jnp.mean((params["slope"] * batch["x"] - batch["y"]) ** 2), (model_state, {})

    def batch(self, seed: int, step: int) -> Any:
        x = np.random.default_rng([seed, step]).uniform(size=8).astype(np.float32)
        return {"x": x, "y": 2 * x}

    def evaluation_batches(self, split: str) -> Any:
        return iter([self.batch(1_000_000, {"validation": 0, "test": 1}[split])])

    def measure(self, params: Any, model_state: Any, batch: Any) -> Any:
        loss, _ = self.loss(params, model_state, batch, None)
        count = jnp.float32(len(batch["x"]))
        return {"mse": (loss * count, count)}


def test_linear_regression_conforms():
    check_conformance(LinearRegression)
