"""Forecasting as a task: the batches that a nowcaster is trained on, and the errors that it is selected by."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.kinds import NowcasterKind
from wnn_jax.lab.forecasting.trajectories import Trajectory
from wnn_jax.lab.forecasting.windows import WindowBatch, WindowSampler
from wnn_jax.lab.tasks.families import SPLITS, TEST_SPLITS, VALIDATION_SPLITS, SplitName
from wnn_jax.lab.tasks.task import EvaluationSplit, Metric, ModelState, Params, Sums

FORECAST_ERROR = "forecast error"
# Horizons with a figure of their own in tables.
REPORTED_HORIZONS = (1, 5, 20, 40)
# The parts of an evaluation split: runs of architectures that are trained on too, and runs of other architectures.
EVALUATED_SPLITS: Mapping[EvaluationSplit, tuple[SplitName, ...]] = {
    "validation": VALIDATION_SPLITS,
    "test": TEST_SPLITS,
}
_PARTS = ("runs", "architectures")

# The windows of an evaluation are the same for every nowcaster and every training run.
_EVALUATION_SEED = 1_000_003
_EVALUATION_WINDOWS_PER_ROLE = 100


class EvaluationBatch(NamedTuple):
    """All windows of one part of an evaluation split.

    Attributes:
      batch: the windows.
      part: int32, 0 for runs and 1 for architectures.
    """

    batch: WindowBatch
    part: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ForecastingTask:
    """Trains a nowcaster on windows of trajectories.

    The first metric is the forecast error: sums of absolute errors relative to forecasting no change, averaged over the
    windows at every horizon, then over horizons, and then over runs and architectures. The other metrics are the same
    for the runs, the architectures, or one horizon alone.

    Attributes:
      kind: what is trained.
      trajectories: the runs of every split.
      windows_per_role: windows of each role in a training batch.
      num_weights: weights of one tensor in a window.
      min_stride: smallest spacing of the snapshots in a window, in snapshots of the run.
      max_stride: largest spacing.

    Raises:
      UsageError: if a split has no run, or a run is too short.
    """

    kind: NowcasterKind
    trajectories: Mapping[SplitName, Sequence[Trajectory]]
    windows_per_role: int
    num_weights: int
    min_stride: int
    max_stride: int

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.trajectories.get(split):
                raise UsageError(f"--collection has no finished run for {split!r}; collect more runs.")
        _ = self._sampler  # It refuses runs that are too short.

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of the tensors that are trained on."""
        return _roles(self.trajectories["train"])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The forecast error, also of each part and at the horizons that the validation runs reach."""
        return self._metrics

    @functools.cached_property
    def _metrics(self) -> tuple[Metric, ...]:
        known = [self.kind.is_known(part.batch.windows).any(axis=0) for part in self.evaluation_batches("validation")]
        horizons = [horizon for horizon in REPORTED_HORIZONS if np.any(known, axis=0)[horizon - 1]]
        names = (FORECAST_ERROR, *_PARTS, *map(name_of_horizon, horizons))
        return tuple(Metric(name, higher_is_better=False) for name in names)

    def describe(self) -> Mapping[str, Any]:
        """Describe the runs of every split by their number and a checksum of their content."""
        description: dict[str, Any] = {}
        for split in SPLITS:
            content = sorted((run.family.name, run.index, run.sha256) for run in self.trajectories[split])
            sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            description[f"{split} runs"] = f"{sha256[:16]} ({len(content)} runs)"
        return description

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Return the first parameters of the nowcaster. There is no model state."""
        return self.kind.init(key, self.roles), {}

    def loss(
        self, params: Params, model_state: ModelState, batch: WindowBatch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """Return the training loss of a batch."""
        del key
        return self.kind.loss(params, batch), (model_state, {})

    def batch(self, seed: int, step: int) -> WindowBatch:
        """Return windows of the training runs."""
        return self._sampler.batch(seed, step, self.windows_per_role)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[EvaluationBatch]:
        """Yield the windows of the runs, and those of the architectures."""
        if split not in self._evaluations:
            self._evaluations[split] = [
                EvaluationBatch(self._draw_evaluation(name), np.int32(part))
                for part, name in enumerate(EVALUATED_SPLITS[split])
            ]
        yield from self._evaluations[split]

    def measure(self, params: Params, model_state: ModelState, batch: EvaluationBatch) -> Sums:
        """Return the mean errors of a part, each with a weight of 1, so that both parts count alike."""
        del model_state
        is_known = self.kind.is_known(batch.batch.windows)
        errors = jnp.where(is_known, self.kind.errors(params, batch.batch), 0.0)
        num_windows = jnp.sum(is_known, axis=0)
        # First over windows, then over horizons: far horizons, which fewer windows reach, count as much as near ones.
        by_horizon = jnp.sum(errors, axis=0) / jnp.maximum(num_windows, 1)
        is_reached = (num_windows > 0).astype(jnp.float32)
        mean = jnp.sum(by_horizon) / jnp.maximum(jnp.sum(is_reached), 1)
        weight = jnp.max(is_reached)
        sums = {FORECAST_ERROR: (mean, weight)}
        for part, name in enumerate(_PARTS):
            is_part = batch.part == part
            sums[name] = jnp.where(is_part, mean, 0.0), jnp.where(is_part, weight, 0.0)
        for horizon in REPORTED_HORIZONS:
            sums[name_of_horizon(horizon)] = by_horizon[horizon - 1], is_reached[horizon - 1]
        return sums

    def _draw_evaluation(self, split: SplitName) -> WindowBatch:
        roles = tuple(role for role in _roles(self.trajectories[split]) if role in self.roles)
        return self._make_sampler(split, roles).batch(_EVALUATION_SEED, 0, _EVALUATION_WINDOWS_PER_ROLE)

    @functools.cached_property
    def _evaluations(self) -> dict[EvaluationSplit, list[EvaluationBatch]]:
        """The batches of every split, drawn once."""
        return {}

    @functools.cached_property
    def _sampler(self) -> WindowSampler:
        return self._make_sampler("train", self.roles)

    def _make_sampler(self, split: SplitName, roles: tuple[str, ...]) -> WindowSampler:
        return WindowSampler(
            self.trajectories[split], roles, self.kind.statistics, self.num_weights, self.min_stride, self.max_stride
        )


def by_split(trajectories: Sequence[Trajectory]) -> dict[SplitName, list[Trajectory]]:
    """Return the runs of every split, in their order."""
    return {split: [trajectory for trajectory in trajectories if trajectory.split == split] for split in SPLITS}


def name_of_horizon(horizon: int) -> str:
    """Return the name of a horizon in tables, such as `5 ahead`."""
    return f"{horizon} ahead"


def _roles(trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    return tuple(sorted({leaf.role for trajectory in trajectories for leaf in trajectory.leaves}))
