"""One training run: resumable, and a pure function of the task, the method, the learning rate and the seed."""

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
from wnn_jax.lab.tasks.task import EvaluationSplit, Task, check_task
from wnn_jax.lab.training.checkpoints import Checkpoints
from wnn_jax.lab.training.evaluation_weights import (
    EMA_DECAYS,
    WEIGHTS,
    BatchStatistics,
    Reading,
    all_readings,
    own_state,
    with_moving_averages,
)
from wnn_jax.lab.training.method import Method, Stage
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import TrainState

# Reading -> metric -> value.
Scores = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is known of a run after some step.

    Attributes:
      step: the steps taken.
      seconds: what they took, compilation and evaluation left out.
      train_loss: its mean since the evaluation before.
      scores: on the validation split.
      num_nowcasts: the forecasts applied so far.
      num_rejected: the forecasts rejected so far.
    """

    step: int
    seconds: float
    train_loss: float
    scores: Scores
    num_nowcasts: int
    num_rejected: int


class Fitted(NamedTuple):
    """A finished run.

    Attributes:
      state: at its end, with the state of the method's own optimizer.
      evaluations: in the order of steps.
      test: the scores on the test split, of the last weights.
      diverged: whether the training loss was no longer finite, which ended the run.
    """

    state: TrainState
    evaluations: list[Evaluation]
    test: Scores
    diverged: bool


Report = Callable[[int, float, Evaluation | None], None]
Stop = Callable[[TrainState, Sequence[Evaluation]], bool]


def _silent(step: int, loss: float, evaluation: Evaluation | None) -> None:
    del step, loss, evaluation


def _never(state: TrainState, evaluations: Sequence[Evaluation]) -> bool:
    del state, evaluations
    return False


class Part(NamedTuple):
    """One stage of the training, compiled."""

    program: Program
    readings: Mapping[str, Reading]
    statistics: BatchStatistics

    def scores(self, state: TrainState, split: EvaluationSplit) -> dict[str, dict[str, float]]:
        """What every reading scores."""
        scores = {}
        for name, reading in self.readings.items():
            params, model_state = self.program.view.network(
                reading.params(state.params, state.opt_state), state.model_state
            )
            if reading.is_average:
                model_state = self.statistics.estimate(params, model_state)
            scores[name] = self.program.evaluate(params, model_state, split)
        return scores


class Trainer:
    """Trains a task by a method at one learning rate, compiled once for runs with several seeds."""

    def __init__(
        self,
        task: Task,
        method: Method,
        *,
        learning_rate: float,
        num_steps: int,
        evaluate_every: int | None = None,
        moving_averages: tuple[float, ...] = EMA_DECAYS,
        scan: bool | None = None,
    ) -> None:
        """Builds the optimizer.

        Args:
          task: what is trained.
          method: how.
          learning_rate: given to the method.
          num_steps: length of the run.
          evaluate_every: steps between evaluations; by default there is one, at the end.
          moving_averages: decays per step of the averages that are evaluated beside the weights.
          scan: see `Program`.

        Raises:
          UsageError: if the task's metrics cannot be compared.
        """
        check_task(task)
        self.task = task
        self.method = method
        self.learning_rate = learning_rate
        self.num_steps = num_steps
        self.evaluate_every = evaluate_every or num_steps
        self._moving_averages = moving_averages
        self._scan = scan
        self._first = self._part(
            method.task(task), method.optimizer(learning_rate, num_steps), method.view, method.readings
        )

    def fit(
        self,
        seed: int,
        folder: Path | None = None,
        *,
        report: Report = _silent,
        stop: Stop = _never,
        checkpoint_seconds: float = 30.0,
        test: bool = True,
    ) -> Fitted:
        """Trains, or goes on from the last checkpoint in `folder`, to the same weights bit for bit.

        Args:
          seed: decides the initial weights, the batches and all keys.
          folder: where the checkpoints are; `None` for none.
          report: called with (step, training loss, evaluation or `None`) now and then.
          stop: called after every evaluation with the state and all evaluations so far: whether to end the run. It
            has to decide by its arguments alone.
          checkpoint_seconds: a checkpoint is saved at the first evaluation this long after the one before.
          test: whether to score the test split at the end.
        """
        first_steps = [stage.first_step(self.num_steps) for stage in self.method.stages]
        ends = [*first_steps, self.num_steps]
        part, state = self._first, self._first.program.init(seed)
        evaluations: list[Evaluation] = []
        is_over = False
        for index, (stage, end) in enumerate(zip([None, *self.method.stages], ends, strict=True)):
            if stage is not None:
                part, state = self._enter(stage, state, seed)
            checkpoints = Checkpoints(None if folder is None else folder / f"stage-{index}", checkpoint_seconds)
            state, log = checkpoints.restore(state, [dataclasses.asdict(evaluation) for evaluation in evaluations])
            evaluations = [Evaluation(**evaluation) for evaluation in log]
            is_over = bool(evaluations) and (_is_diverged(evaluations) or stop(state, evaluations))
            while int(state.step) < end and not is_over:
                state, evaluation = self._advance(part, state, seed, end, evaluations, report)
                evaluations.append(evaluation)
                is_over = _is_diverged(evaluations) or stop(state, evaluations)
                is_last = evaluation.step == end or is_over
                # The end of a stage is where a run that was killed in a later one comes from.
                checkpoints.save(
                    evaluation.step,
                    state,
                    [dataclasses.asdict(evaluation) for evaluation in evaluations],
                    now=is_last and bool(self.method.stages),
                )
                report(evaluation.step, evaluation.train_loss, evaluation)
            if is_over:
                break
        return Fitted(
            state=state._replace(opt_state=own_state(state.opt_state)),
            evaluations=evaluations,
            test=part.scores(state, "test") if test else {},
            diverged=_is_diverged(evaluations),
        )

    def _advance(
        self,
        part: Part,
        state: TrainState,
        seed: int,
        end: int,
        evaluations: list[Evaluation],
        report: Report,
    ) -> tuple[TrainState, Evaluation]:
        """Trains until the next evaluation."""
        next_stop = min((int(state.step) // self.evaluate_every + 1) * self.evaluate_every, end)
        state, loss, seconds = part.program.advance(
            state, seed, next_stop, on_step=lambda step, loss: report(step, loss, None)
        )
        return state, Evaluation(
            step=next_stop,
            seconds=seconds + (evaluations[-1].seconds if evaluations else 0.0),
            train_loss=loss,
            scores=part.scores(state, "validation"),
            num_nowcasts=_count(state.opt_state, "num_nowcasts"),
            num_rejected=_count(state.opt_state, "num_rejected"),
        )

    def _enter(self, stage: Stage, state: TrainState, seed: int) -> tuple[Part, TrainState]:
        """The beginning of a further stage.

        Raises:
          UsageError: if it cannot begin where the stage before has ended.
        """
        own = state._replace(opt_state=own_state(state.opt_state))
        try:
            start = stage.start(self.task, own, self.learning_rate, self.num_steps, seed)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"learning rate {self.learning_rate:g}, {self.method.name!r} cannot go on after {int(state.step)} steps: "
                f"{error}"
            ) from error
        part = self._part(start.task, start.optimizer, start.view, start.readings)
        state = part.program.resume(TrainState(state.step, start.params, start.model_state, None))
        if start.opt_state is not None:
            state = state._replace(opt_state=state.opt_state | {"optimizer": start.opt_state})
        return part, state

    def _part(
        self, task: Task, optimizer: optax.GradientTransformation, view: Any, readings: Mapping[str, Reading]
    ) -> Part:
        tx = with_moving_averages(optimizer, self._moving_averages)
        program = Program(task, lambda: tx, view, scan=self._scan)
        return Part(program, all_readings(readings, self._moving_averages), BatchStatistics(task))


def fit(
    task: Task,
    method: Method,
    seed: int,
    *,
    learning_rate: float,
    num_steps: int,
    evaluate_every: int | None = None,
    folder: Path | None = None,
) -> Fitted:
    """Trains a task once. `Trainer` does the same for several seeds, and has more options.

    Args:
      task: what is trained.
      method: how.
      seed: decides the initial weights, the batches and all keys.
      learning_rate: given to the method.
      num_steps: length of the run.
      evaluate_every: steps between evaluations; by default there is one, at the end.
      folder: where to keep checkpoints, and to go on from the last one.
    """
    trainer = Trainer(task, method, learning_rate=learning_rate, num_steps=num_steps, evaluate_every=evaluate_every)
    return trainer.fit(seed, folder)


def weights_sha256(params: Any) -> str:
    """One hash of all weights, to tell at a glance whether two runs ended in the same place."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _is_diverged(evaluations: Sequence[Evaluation]) -> bool:
    last = evaluations[-1]
    target = list(last.scores[WEIGHTS].values())
    return not math.isfinite(last.train_loss) or not all(map(math.isfinite, target))


def _count(opt_state: Any, name: str) -> int:
    """The sum of a counter over all nowcasts in an optimizer."""
    return sum(int(np.sum(value)) for _, value in optax.tree.get_all_with_path(opt_state, name))
