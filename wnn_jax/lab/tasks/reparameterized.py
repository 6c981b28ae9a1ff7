"""Tasks whose parameters stand for the parameters of another task."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from wnn_jax import averaging
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums, Task


@dataclasses.dataclass(frozen=True, eq=False)
class Reparameterized:
    """Another task, `base`, whose parameters are a function of the trained parameters.

    A subclass says which function, and defines `describe` and `init`.
    """

    base: Task

    def network(self, params: Params) -> Params:
        """Return the parameters of the base task that the trained parameters stand for."""
        return params

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.base.metrics

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        return self.base.loss(self.network(params), model_state, batch, key)

    def batch(self, seed: int, step: int) -> Batch:
        return self.base.batch(seed, step)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        return self.base.evaluation_batches(split)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        return self.base.measure(self.network(params), model_state, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients(Reparameterized):
    """Trains the coefficients of a combination of checkpoints: TWA (Li et al., ICLR 2023)."""

    subspace: averaging.Subspace
    model_state: ModelState
    start: Any = "mean"

    def describe(self) -> Mapping[str, Any]:
        """Describe the base task and the form of the subspace. The checkpoints themselves follow from the run."""
        return {
            "kind": "coefficients",
            "base": dict(self.base.describe()),
            "form": self.subspace.form,
            "bits": self.subspace.bits,
            "start": self.start,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        del key
        return averaging.init_coefficients(self.subspace, self.start), self.model_state

    def network(self, params: Params) -> Params:
        """Return the combination of the checkpoints."""
        return averaging.combine(self.subspace, params)
