"""Tasks whose parameters are those of another task in another form."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task


@dataclasses.dataclass(frozen=True, eq=False)
class Reparameterized(abc.ABC):
    """Another task, whose parameters are a function of those that are trained.

    Attributes:
      base: the other task.
    """

    base: Task

    @abc.abstractmethod
    def network(self, params: Params) -> Params:
        """The parameters of the base task that parameters of this one stand for."""

    @abc.abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """What its results depend on, the description of the base task included."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters in the form that is trained, and the model state of the base task."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the base task."""
        return self.base.metrics

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The loss of the base task."""
        return self.base.loss(self.network(params), model_state, batch, key)

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of the base task."""
        return self.base.batch(seed, step)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """The batches of the base task."""
        return self.base.evaluation_batches(split)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """What the base task measures."""
        return self.base.measure(self.network(params), model_state, batch)
