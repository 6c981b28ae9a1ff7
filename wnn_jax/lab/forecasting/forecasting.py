"""The task of forecasting: what a nowcaster is trained on, selected by, and scored by."""

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
from wnn_jax.lab.forecasting.collection import Trajectory
from wnn_jax.lab.forecasting.objectives import Objective, known_changes
from wnn_jax.lab.forecasting.windows import MIN_HORIZON, NUM_HORIZONS, WindowBatch, WindowSampler
from wnn_jax.lab.tasks.families import SPLITS, TEST_SPLITS, VALIDATION_SPLITS, SplitName
from wnn_jax.lab.tasks.task import EvaluationSplit, Metric, ModelState, Params, Sums

FORECAST_ERROR = "forecast error"
# Horizons that have a figure of their own in tables.
REPORTED_HORIZONS = (1, 5, 20, 40)

# The windows of an evaluation are the same for every nowcaster and every training.
EVALUATION_SEED = 1_000_003
_EVALUATION_WINDOWS_PER_ROLE = 100

# The parts of an evaluation split: runs of architectures that are trained on too, and runs of other architectures.
EVALUATED_SPLITS: Mapping[EvaluationSplit, tuple[SplitName, ...]] = {
    "validation": VALIDATION_SPLITS,
    "test": TEST_SPLITS,
}
_PART_NAMES = ("runs", "architectures")


class EvaluationBatch(NamedTuple):
    """All windows of one part of an evaluation split.

    Attributes:
      batch: the windows.
      part: int32, the number of the part: 0 for runs, 1 for architectures.
    """

    batch: WindowBatch
    part: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forecasting:
    """Training of a nowcaster on windows of trajectories.

    The first metric is the forecast error: sums of absolute errors as a share of those of forecasting no change, the
    mean over the windows at every horizon, then over horizons, and then over runs and architectures. The other metrics
    are the same at single horizons, and over the runs or the architectures alone.

    Attributes:
      objective: what is trained, and its loss.
      trajectories: the runs of every split.
      windows_per_role: windows of each role in a training batch.
      num_weights: weights of one tensor in a window.
      min_stride: smallest spacing of the snapshots in a window, in snapshots of the run.
      max_stride: largest spacing.
      average: see `read_window`.

    Raises:
      UsageError: if a split has no run, or a run is too short.
    """

    objective: Objective
    trajectories: Mapping[SplitName, Sequence[Trajectory]]
    windows_per_role: int
    num_weights: int
    min_stride: int
    max_stride: int
    average: bool = False

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self.trajectories.get(split):
                raise UsageError(f"--collection has no finished run for {split!r}; collect more runs.")
        _ = self._sampler  # It refuses runs that are too short.

    @property
    def used(self) -> Mapping[SplitName, Sequence[Trajectory]]:
        """The runs of every split that are not left out, which are all."""
        return self.trajectories

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of the tensors that are trained on."""
        return _roles(self.trajectories["train"])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The forecast error, of all windows, of each part, and at the horizons that the validation runs reach."""
        return self._metrics

    @functools.cached_property
    def _metrics(self) -> tuple[Metric, ...]:
        reached = np.any([self._is_known(part.batch).any(axis=0) for part in self._evaluation("validation")], axis=0)
        horizons = [horizon for horizon in REPORTED_HORIZONS if reached[horizon - 1]]
        names = (FORECAST_ERROR, *_PART_NAMES, *map(name_of_horizon, horizons))
        return tuple(Metric(name, higher_is_better=False) for name in names)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on: the objective, how windows are drawn, and the content of all runs."""
        return {
            "kind": "forecasting",
            "objective": repr(self.objective),
            "windows_per_role": self.windows_per_role,
            "num_weights": self.num_weights,
            "min_stride": self.min_stride,
            "max_stride": self.max_stride,
            "average": self.average,
            "evaluation": {"seed": EVALUATION_SEED, "windows_per_role": _EVALUATION_WINDOWS_PER_ROLE},
            "runs": {split: describe_runs(self.trajectories[split]) for split in SPLITS},
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters of the nowcaster to start from; there is no model state."""
        return self.objective.init(key, self.roles), {}

    def loss(
        self, params: Params, model_state: ModelState, batch: WindowBatch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The objective's loss of a batch."""
        del key
        return self.objective.loss(params, batch), (model_state, {})

    def batch(self, seed: int, step: int) -> WindowBatch:
        """Windows of the training runs."""
        return self._sampler.batch(seed, step, self.windows_per_role)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[EvaluationBatch]:
        """The windows of the runs and those of the architectures of a split."""
        yield from self._evaluation(split)

    def measure(self, params: Params, model_state: ModelState, batch: EvaluationBatch) -> Sums:
        """The mean errors of a part, each with a weight of 1, so that both parts count alike.

        An error is averaged over windows first, at every horizon, and then over horizons.
        """
        del model_state
        is_known = self._is_known(batch.batch)
        errors = jnp.where(is_known, self.objective.errors(params, batch.batch), 0.0)
        num_windows = jnp.sum(is_known, axis=0)
        by_horizon = jnp.sum(errors, axis=0) / jnp.maximum(num_windows, 1)
        is_reached = (num_windows > 0).astype(jnp.float32)
        mean = jnp.sum(by_horizon) / jnp.maximum(jnp.sum(is_reached), 1)
        weight = jnp.max(is_reached)
        sums = {FORECAST_ERROR: (mean, weight)}
        for part, name in enumerate(_PART_NAMES):
            is_part = batch.part == part
            sums[name] = jnp.where(is_part, mean, 0.0), jnp.where(is_part, weight, 0.0)
        for horizon in REPORTED_HORIZONS:
            sums[name_of_horizon(horizon)] = by_horizon[horizon - 1], is_reached[horizon - 1]
        return sums

    def _is_known(self, batch: WindowBatch) -> jax.Array:
        """`[windows, 40]` bool: which changes are both forecast and known."""
        is_forecast = np.isin(np.arange(1, NUM_HORIZONS + 1), self.objective.horizons)
        return known_changes(batch.windows) & is_forecast[None]

    def _evaluation(self, split: EvaluationSplit) -> list[EvaluationBatch]:
        """The batches of a split, drawn once."""
        if split not in self._evaluations:
            self._evaluations[split] = [
                EvaluationBatch(self._draw_evaluation(name), np.int32(part))
                for part, name in enumerate(EVALUATED_SPLITS[split])
            ]
        return self._evaluations[split]

    def _draw_evaluation(self, split: SplitName) -> WindowBatch:
        roles = tuple(role for role in _roles(self.trajectories[split]) if role in self.roles)
        return self._make_sampler(split, roles).batch(EVALUATION_SEED, 0, _EVALUATION_WINDOWS_PER_ROLE)

    @functools.cached_property
    def _evaluations(self) -> dict[EvaluationSplit, list[EvaluationBatch]]:
        return {}

    @functools.cached_property
    def _sampler(self) -> WindowSampler:
        return self._make_sampler("train", self.roles)

    def _make_sampler(self, split: SplitName, roles: tuple[str, ...]) -> WindowSampler:
        return WindowSampler(
            trajectories=self.trajectories[split],
            roles=roles,
            statistics=self.objective.statistics,
            num_weights=self.num_weights,
            min_stride=self.min_stride,
            max_stride=self.max_stride,
            average=self.average,
            offsets=self.objective.offsets,
            min_horizon=max(MIN_HORIZON, self.objective.horizons[0]),
        )


def by_split(trajectories: Sequence[Trajectory]) -> dict[SplitName, list[Trajectory]]:
    """The runs of every split, in their order."""
    return {split: [trajectory for trajectory in trajectories if trajectory.split == split] for split in SPLITS}


def name_of_horizon(horizon: int) -> str:
    """`5 ahead`, for tables."""
    return f"{horizon} ahead"


def _roles(trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    return tuple(sorted({leaf.role for trajectory in trajectories for leaf in trajectory.leaves}))


def describe_runs(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Tells whether two collections have the same runs."""
    content = [(trajectory.family, trajectory.index, trajectory.sha256) for trajectory in trajectories]
    return {"number": len(content), "sha256": hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()}
