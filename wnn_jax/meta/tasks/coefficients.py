"""Training the coefficients of a combination of checkpoints: trainable weight averaging (TWA)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from wnn_jax import averaging
from wnn_jax.meta.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """Another task, whose parameters are confined to a subspace.

    Attributes:
      base: the task whose parameters are combined.
      subspace: of its parameters.
      model_state: of the base task, to begin with.
      start: the combination to begin with: the uniform average, or the last checkpoint.

    References:
      Li et al., `Trainable Weight Averaging <https://arxiv.org/abs/2205.13104>`_, ICLR 2023
    """

    base: Task
    subspace: averaging.Subspace
    model_state: ModelState
    start: Any = "mean"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the base task."""
        return self.base.metrics

    def describe(self) -> Mapping[str, Any]:
        """The base task, and the form of the subspace. The checkpoints themselves follow from the run."""
        return {
            "kind": "coefficients",
            "base": dict(self.base.describe()),
            "form": self.subspace.form,
            "bits": self.subspace.bits,
            "start": self.start,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """The coefficients of the uniform average or of the last checkpoint."""
        del key
        return averaging.init_coefficients(self.subspace, self.start), self.model_state

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The loss of the base task, of the combination."""
        return self.base.loss(averaging.combine(self.subspace, params), model_state, batch, key)

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of the base task."""
        return self.base.batch(seed, step)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """The batches of the base task."""
        return self.base.evaluation_batches(split)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """What the combination scores."""
        return self.base.measure(averaging.combine(self.subspace, params), model_state, batch)
