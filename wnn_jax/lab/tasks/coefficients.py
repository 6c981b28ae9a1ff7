"""Training the coefficients of a combination of checkpoints: trainable weight averaging (TWA)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from wnn_jax import averaging
from wnn_jax.lab.tasks.reparameterized import Reparameterized
from wnn_jax.lab.tasks.task import ModelState, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients(Reparameterized):
    """Another task, whose parameters are confined to a subspace.

    Attributes:
      base: the task whose parameters are combined.
      subspace: of its parameters.
      model_state: of the base task, to begin with.
      start: the combination to begin with: the uniform average, or the last checkpoint.

    References:
      Li et al., `Trainable Weight Averaging <https://arxiv.org/abs/2205.13104>`_, ICLR 2023
    """

    subspace: averaging.Subspace
    model_state: ModelState
    start: Any = "mean"

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

    def network(self, params: Params) -> Params:
        """The combination."""
        return averaging.combine(self.subspace, params)
