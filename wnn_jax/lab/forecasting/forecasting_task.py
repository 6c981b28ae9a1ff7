"""Forecasting as a task: the batches that a nowcaster is trained on, and the errors that it is selected by."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.families import SPLITS, TEST_SPLITS, VALIDATION_SPLITS, SplitName
from wnn_jax.lab.forecasting.kinds import NowcasterKind
from wnn_jax.lab.forecasting.trajectories import Trajectory
from wnn_jax.lab.forecasting.windows import WindowBatch, WindowSampler
from wnn_jax.lab.tasks.task import EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

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

# The windows of one part of an evaluation split, and the number of the part.
EvaluationBatch = tuple[WindowBatch, Any]


class ForecastingTask:
    """Trains a nowcaster on windows of trajectories.

    The first metric is the forecast error: sums of absolute errors relative to forecasting no change, averaged over the
    windows at every horizon, then over horizons, and then over runs and architectures. The other metrics are the same
    for the runs, the architectures, or one horizon alone. A split without a run, or a run that is too short, is a
    `UsageError`.
    """

    def __init__(
        self, kind: NowcasterKind, trajectories: Sequence[Trajectory], *, windows_per_role: int, num_weights: int
    ) -> None:
        self.kind = kind
        self.trajectories = {split: [run for run in trajectories if run.split == split] for split in SPLITS}
        for split, runs in self.trajectories.items():
            if not runs:
                raise UsageError(f"--collection has no finished run for {split!r}; collect more runs.")
        self.roles = self._roles_of("train")
        self._windows_per_role = windows_per_role
        self._make_sampler = functools.partial(WindowSampler, statistics=kind.statistics, num_weights=num_weights)
        self._sampler = self._make_sampler(self.trajectories["train"], self.roles)
        self._evaluations = {split: self._evaluation(split) for split in EVALUATED_SPLITS}
        parts = self._evaluations["validation"]
        is_reached = np.any([kind.is_known(batch.windows).any(axis=0) for batch, _ in parts], axis=0)
        horizons = [horizon for horizon in REPORTED_HORIZONS if is_reached[horizon - 1]]
        names = (FORECAST_ERROR, *_PARTS, *map(name_of_horizon, horizons))
        self.metrics = tuple(Metric(name, higher_is_better=False) for name in names)

    def describe(self) -> Mapping[str, Any]:
        """Describe the runs of every split by their number and a checksum of their content."""
        description: dict[str, Any] = {}
        for split, runs in self.trajectories.items():
            checksums = [hashlib.sha256(run.snapshots.data).hexdigest() for run in runs]
            content = sorted((run.family.name, run.index, sha256) for run, sha256 in zip(runs, checksums, strict=True))
            sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            description[f"{split} runs"] = f"{sha256[:16]} ({len(runs)} runs)"
        return description

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Return the first parameters of the nowcaster. There is no model state."""
        return self.kind.init(key, self.roles), {}

    def loss(self, params: Params, model_state: ModelState, batch: WindowBatch, key: jax.Array) -> LossAndState:
        """Return the training loss of a batch."""
        del key
        return self.kind.loss(params, batch), model_state

    def batch(self, seed: int, step: int) -> WindowBatch:
        """Return windows of the training runs."""
        return self._sampler.batch(seed, step, self._windows_per_role)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[EvaluationBatch]:
        """Yield the windows of the runs, and the windows of the architectures."""
        yield from self._evaluations[split]

    def measure(self, params: Params, model_state: ModelState, batch: EvaluationBatch) -> Sums:
        """Return the mean errors of a part, each with a weight of 1, so that both parts count alike."""
        del model_state
        windows, batch_part = batch
        is_known = self.kind.is_known(windows.windows)
        errors = jnp.where(is_known, self.kind.errors(params, windows), 0.0)
        num_windows = jnp.sum(is_known, axis=0)
        # First over windows, then over horizons: far horizons, which fewer windows reach, count as much as near ones.
        by_horizon = jnp.sum(errors, axis=0) / jnp.maximum(num_windows, 1)
        is_reached = (num_windows > 0).astype(jnp.float32)
        mean = jnp.sum(by_horizon) / jnp.maximum(jnp.sum(is_reached), 1)
        weight = jnp.max(is_reached)
        sums = {FORECAST_ERROR: (mean, weight)}
        for part, name in enumerate(_PARTS):
            is_part = batch_part == part
            sums[name] = jnp.where(is_part, mean, 0.0), jnp.where(is_part, weight, 0.0)
        for horizon in REPORTED_HORIZONS:
            sums[name_of_horizon(horizon)] = by_horizon[horizon - 1], is_reached[horizon - 1]
        return sums

    def _evaluation(self, split: EvaluationSplit) -> list[EvaluationBatch]:
        batches: list[EvaluationBatch] = []
        for part, name in enumerate(EVALUATED_SPLITS[split]):
            roles = tuple(role for role in self._roles_of(name) if role in self.roles)
            sampler = self._make_sampler(self.trajectories[name], roles)
            batches.append((sampler.batch(_EVALUATION_SEED, 0, _EVALUATION_WINDOWS_PER_ROLE), np.int32(part)))
        return batches

    def _roles_of(self, split: SplitName) -> tuple[str, ...]:
        return tuple(sorted({leaf.role for run in self.trajectories[split] for leaf in run.leaves}))


def name_of_horizon(horizon: int) -> str:
    """Return the name of a horizon in tables, such as `5 ahead`."""
    return f"{horizon} ahead"
