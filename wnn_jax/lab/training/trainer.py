"""Runs: resumable, each a pure function of the task, the method, the learning rate and the seed."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import EvaluationSplit, ModelState, Params, Task, check_task
from wnn_jax.lab.training.checkpoints import Checkpoints
from wnn_jax.lab.training.evaluation_weights import (
    EMA_DECAYS,
    OPTIMIZER,
    WEIGHTS,
    EvaluationWeights,
    all_evaluation_weights,
    batch_stats_estimator,
    with_moving_averages,
)
from wnn_jax.lab.training.method import Method, Stage
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import TrainState

# Evaluation weights -> metric -> value.
Scores = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a run on the validation split, after `step` steps."""

    step: int
    seconds: float
    """The time of all steps so far, without compilation and evaluation."""
    train_loss: float
    """The mean training loss since the evaluation before."""
    scores: Scores
    num_nowcasts: int
    num_rejected: int


class Fitted(NamedTuple):
    """A finished run."""

    state: TrainState
    """The last state, with the state of the method's own optimizer."""
    evaluations: list[Evaluation]
    test: Scores
    """The scores on the test split, at the end."""
    diverged: bool
    """Whether the run ended early because its loss was no longer finite."""


Report = Callable[[int, float, Evaluation | None], None]
Stop = Callable[[TrainState, Sequence[Evaluation]], bool]


class _CompiledStage(NamedTuple):
    """One stage of the method, compiled."""

    program: Program
    evaluation_weights: Mapping[str, EvaluationWeights]
    estimate_batch_stats: Callable[[Params, ModelState], ModelState]

    def scores(self, state: TrainState, split: EvaluationSplit) -> dict[str, dict[str, float]]:
        scores = {}
        for name, weights in self.evaluation_weights.items():
            params, model_state = self.program.view.network(
                weights.params(state.params, state.opt_state), state.model_state
            )
            if weights.is_average:
                model_state = self.estimate_batch_stats(params, model_state)
            scores[name] = self.program.evaluate(params, model_state, split)
        return scores


class Trainer:
    """Trains a task by a method at one learning rate, compiled once for runs with several seeds.

    By default there is one evaluation, at the end. `moving_averages` are the decays per step of the averages to
    evaluate in addition to the weights. A task without metrics, or with two of one name, is a `UsageError`.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        *,
        learning_rate: float,
        num_steps: int,
        evaluate_every: int | None = None,
        moving_averages: tuple[float, ...] = EMA_DECAYS,
    ) -> None:
        check_task(task)
        self.task, self.method, self._learning_rate, self._num_steps = task, method, learning_rate, num_steps
        self._evaluate_every = evaluate_every or num_steps
        self._moving_averages = moving_averages
        optimizer = method.optimizer(learning_rate, num_steps)
        self._first_stage = self._compile(method.task(task), optimizer, method.view, method.evaluation_weights)

    def fit(
        self,
        seed: int,
        folder: Path | None = None,
        *,
        report: Report = lambda step, loss, evaluation: None,
        stop: Stop = lambda state, evaluations: False,
        checkpoint_seconds: float = 30.0,
        test: bool = True,
    ) -> Fitted:
        """Train from the start, or from the last checkpoint in `folder`, to the same weights bit for bit.

        Args:
          seed: decides the initial weights, the batches and all keys.
          folder: where checkpoints are kept, or `None` for no checkpoints.
          report: called now and then with the step, the training loss, and the evaluation or `None`.
          stop: called after every evaluation with the state and all evaluations so far: whether to end the run. It must
            decide by its arguments alone.
          checkpoint_seconds: the first evaluation this long after the last checkpoint saves a checkpoint.
          test: whether to score the test split at the end.

        Raises:
          UsageError: if a later stage cannot begin where the stage before ended, or all checkpoints are damaged.
        """
        ends = [*(stage.first_step(self._num_steps) for stage in self.method.stages), self._num_steps]
        compiled, state = self._first_stage, self._first_stage.program.init(seed)
        evaluations: list[Evaluation] = []
        is_over = False
        for index, (stage, end) in enumerate(zip([None, *self.method.stages], ends, strict=True)):
            if stage is not None:
                compiled, state = self._enter(stage, state, seed)
            checkpoints = Checkpoints(None if folder is None else folder / f"stage-{index}", checkpoint_seconds)
            state, log = checkpoints.restore(state, list(map(dataclasses.asdict, evaluations)))
            evaluations = [Evaluation(**evaluation) for evaluation in log]
            is_over = bool(evaluations) and (_is_diverged(evaluations) or stop(state, evaluations))
            while int(state.step) < end and not is_over:
                step = min((int(state.step) // self._evaluate_every + 1) * self._evaluate_every, end)
                state, loss, seconds = compiled.program.advance(
                    state, seed, step, on_step=lambda step, loss: report(step, loss, None)
                )
                evaluation = Evaluation(
                    step,
                    seconds + (evaluations[-1].seconds if evaluations else 0.0),
                    train_loss=loss,
                    scores=compiled.scores(state, "validation"),
                    num_nowcasts=_count(state.opt_state, "num_nowcasts"),
                    num_rejected=_count(state.opt_state, "num_rejected"),
                )
                evaluations.append(evaluation)
                is_over = _is_diverged(evaluations) or stop(state, evaluations)
                # A run that is killed in a later stage goes on from the end of the stage before.
                now = (step == end or is_over) and bool(self.method.stages)
                checkpoints.save(step, state, list(map(dataclasses.asdict, evaluations)), now=now)
                report(step, loss, evaluation)
            if is_over:
                break
        scores = compiled.scores(state, "test") if test else {}
        return Fitted(_with_own_optimizer(state), evaluations, scores, _is_diverged(evaluations))

    def _enter(self, stage: Stage, state: TrainState, seed: int) -> tuple[_CompiledStage, TrainState]:
        """Begin a later stage."""
        try:
            start = stage.start(self.task, _with_own_optimizer(state), self._learning_rate, self._num_steps, seed)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"learning rate {self._learning_rate:g}, {self.method.name!r} cannot go on after {int(state.step)} "
                f"steps: {error}"
            ) from error
        compiled = self._compile(start.task, start.optimizer, start.view, start.evaluation_weights)
        state = compiled.program.resume(TrainState(state.step, start.params, start.model_state, None))
        if start.opt_state is not None:
            state = state._replace(opt_state=state.opt_state | {OPTIMIZER: start.opt_state})
        return compiled, state

    def _compile(
        self, task: Task, optimizer: optax.GradientTransformation, view: Any, own: Mapping[str, EvaluationWeights]
    ) -> _CompiledStage:
        program = Program(task, with_moving_averages(optimizer, self._moving_averages), view)
        return _CompiledStage(program, all_evaluation_weights(own, self._moving_averages), batch_stats_estimator(task))


def _with_own_optimizer(state: TrainState) -> TrainState:
    """Return a state without the moving averages."""
    return state._replace(opt_state=state.opt_state[OPTIMIZER])


def weights_sha256(params: Any) -> str:
    """Return a hash of all weights. Two runs with one hash ended in the same place."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _is_diverged(evaluations: Sequence[Evaluation]) -> bool:
    last = evaluations[-1]
    return not all(map(math.isfinite, (last.train_loss, *last.scores[WEIGHTS].values())))


def _count(opt_state: Any, name: str) -> int:
    """Sum a counter over all nowcasts in an optimizer."""
    return sum(int(np.sum(value)) for _, value in optax.tree.get_all_with_path(opt_state, name))
