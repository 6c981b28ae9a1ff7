"""Training nowcasters on collected trajectories."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import optax
import tyro

import wnn_jax
from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError, check_options, look_up
from wnn_jax.lab.forecasting._jobs import lock
from wnn_jax.lab.forecasting.kinds import KINDS
from wnn_jax.lab.forecasting.task import FORECAST_ERROR, ForecastingTask, by_split
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.families import SplitName
from wnn_jax.lab.training.evaluation_weights import WEIGHTS
from wnn_jax.lab.training.keys import RESULTS_VERSION, run_key, versions
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import TrainState
from wnn_jax.lab.training.trainer import Evaluation, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a nowcaster on collected trajectories.

    The nowcaster with the smallest forecast error on the validation runs is kept, and scored once on the test runs. Call
    it again with the same options to go on with an interrupted training run, to the same nowcaster.
    """

    collection: tuple[Path, ...]
    """Folders that `collect` filled."""
    output: Path
    """Folder for the nowcaster, its metrics and the checkpoints."""
    kind: Annotated[str, tyro.conf.arg(help=f"What to train: {', '.join(KINDS)}.", metavar="KIND")] = "pooled-linear"
    num_steps: int = 4_000
    """Training steps."""
    learning_rate: float = 3e-3
    """Initial learning rate, which decays to zero."""
    windows_per_role: int = 32
    """Windows of each role in a batch."""
    num_weights: int = 128
    """Weights of one tensor in a window."""
    min_stride: int = 4
    """Smallest spacing of the snapshots in a window, in snapshots of the run."""
    max_stride: int = 16
    """Largest spacing."""
    validate_every: int = 250
    """Steps between validations."""
    patience: int = 8
    """Validations without an improvement after which training stops."""
    seed: int = 0
    """Decides the initial weights and the windows."""


_POSITIVE = (
    "num_steps",
    "learning_rate",
    "windows_per_role",
    "num_weights",
    "min_stride",
    "max_stride",
    "validate_every",
    "patience",
)


def train(options: Train) -> wnn_jax.Nowcaster:
    """Train a nowcaster, and keep the best one as `nowcaster.npz` in the output folder.

    Returns:
      The nowcaster, with its record.

    Raises:
      UsageError: if an option cannot be used, a collection lacks what is needed or is damaged, the output folder holds
        another training run, or the training run diverges at once.
    """
    check_options(options, positive=_POSITIVE)
    if options.min_stride > options.max_stride:
        raise UsageError(f"--min-stride {options.min_stride} must not exceed --max-stride {options.max_stride}.")
    task = ForecastingTask(
        kind=look_up(KINDS, options.kind, "--kind"),
        trajectories=by_split(load_trajectories(options.collection)),
        windows_per_role=options.windows_per_role,
        num_weights=options.num_weights,
        min_stride=options.min_stride,
        max_stride=options.max_stride,
    )
    settings = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("collection", "output")
    }
    description = {"results_version": RESULTS_VERSION, **settings, **task.describe()}
    record = {
        "kind": options.kind,
        "settings": settings,
        "data": describe_data(task.trajectories),
        "versions": versions(),
        "training": run_key(description),
    }
    with _locked_folder(options.output, description):
        selection = _Selection(task, options.output, record, options.patience)
        evaluations = _fit(options, task, selection)
        nowcaster = selection.best_nowcaster(evaluations)
        # Nothing is left to decide, so the test runs may be seen.
        test = Program(task, optax.identity).evaluate(nowcaster.params, {}, "test")
        nowcaster = dataclasses.replace(nowcaster, record={**nowcaster.record, "test": _finite(test)})
        wnn_jax.save(nowcaster, selection.file)
    return nowcaster


def describe_data(splits: Mapping[SplitName, Sequence[Trajectory]]) -> dict[str, Any]:
    """Describe the runs of every split for the record of a nowcaster, in types that JSON has."""
    families = {run.family.name: dataclasses.asdict(run.family) for runs in splits.values() for run in runs}

    def describe(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        settings = [run.settings for run in trajectories]
        return {
            "runs": len(trajectories),
            "seeds": {name: sorted(run.index for run in trajectories if run.family.name == name) for name in families},
            "optimizer_steps": sum(each.num_steps for each in settings),
            "architectures": sorted({f"{each.architecture} on {each.dataset}" for each in settings}),
        }

    return {"families": families, **{split: describe(trajectories) for split, trajectories in splits.items()}}


class _Selection:
    """Keeps the best nowcaster so far in a file, and ends the training run when nothing improves any more.

    The trainer calls it after every evaluation and before it saves the checkpoint. So the file holds the best nowcaster
    of all evaluations in the checkpoint, or of a later evaluation, which a resumed run repeats bit for bit.
    """

    def __init__(self, task: ForecastingTask, folder: Path, record: Mapping[str, Any], patience: int) -> None:
        self.file = folder / "nowcaster.npz"
        self._task = task
        self._record = record
        self._patience = patience

    def __call__(self, state: TrainState, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether to stop."""
        rows = [{**_figures(evaluation), "seconds": evaluation.seconds} for evaluation in evaluations]
        save_rows(rows, self.file.parent / "metrics.csv")
        best = _best(evaluations)
        if best == len(evaluations) - 1 and math.isfinite(_error(evaluations[best])):
            record = {**self._record, "validation": _finite(_figures(evaluations[best]))}
            wnn_jax.save(self._task.kind.nowcaster(jax.device_get(state.params), record=record), self.file)
        return len(evaluations) - 1 - best >= self._patience

    def best_nowcaster(self, evaluations: Sequence[Evaluation]) -> Any:
        """Load the best nowcaster.

        Raises:
          UsageError: if the training run diverged before the first evaluation, or the file holds another nowcaster.
        """
        best = evaluations[_best(evaluations)]
        if not math.isfinite(_error(best)):
            raise UsageError(
                f"--learning-rate {self._record['settings']['learning_rate']}: the training run diverged before the first "
                "validation; choose a smaller one, and another --output."
            )
        try:
            nowcaster: Any = wnn_jax.load(self.file)
            made_by = nowcaster.record["training"], nowcaster.record["validation"]["step"]
        except (ValueError, FileNotFoundError, AttributeError, KeyError):
            nowcaster, made_by = None, None
        if made_by != (self._record["training"], best.step):
            raise UsageError(
                f"{self.file} is not the nowcaster that this training run kept at step {best.step}; train again with "
                "another --output."
            )
        return nowcaster


def _fit(options: Train, task: ForecastingTask, selection: _Selection) -> list[Evaluation]:
    """Train, or go on, until the selection says stop."""
    trainer = Trainer(
        task,
        Method(options.kind, task.kind.optimizer),
        learning_rate=options.learning_rate,
        num_steps=options.num_steps,
        evaluate_every=options.validate_every,
        moving_averages=(),
    )
    with Progress(options.kind, total=options.num_steps) as progress:
        shown, validation = 0, ""

        def report(step: int, loss: float, evaluation: Evaluation | None) -> None:
            nonlocal shown, validation
            if evaluation is not None:
                validation = f"  validation {evaluation.scores[WEIGHTS][FORECAST_ERROR]:.4f}"
            elif step % options.validate_every == 0 or step == options.num_steps:
                return  # The evaluation follows.
            progress.advance(step - shown, f"loss {loss:.4f}{validation}")
            shown = step

        # The networks are small, so every evaluation saves a checkpoint.
        fitted = trainer.fit(
            options.seed,
            options.output / "checkpoints",
            report=report,
            stop=selection,
            checkpoint_seconds=0.0,
            test=False,
        )
    return fitted.evaluations


@contextlib.contextmanager
def _locked_folder(folder: Path, description: Mapping[str, Any]) -> Generator[None]:
    """Keep other processes out of the output folder, and refuse a folder of another training run.

    Raises:
      UsageError: if another process trains there, or something else was trained there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "training.json"
    with lock(file) as is_granted:
        if not is_granted:
            raise UsageError(f"--output {folder}: another process trains there. Wait for it, or choose another folder.")
        if file.exists():
            _check_same_run(file, description)
        elif (folder / "checkpoints").exists() or (folder / "nowcaster.npz").exists():
            raise UsageError(f"--output {folder} holds a training run of another version; choose another folder.")
        else:
            with replace_on_success(file) as temporary:
                temporary.write_text(json.dumps({"key": run_key(description), **description}, indent=1) + "\n")
        yield


def _check_same_run(file: Path, description: Mapping[str, Any]) -> None:
    try:
        before = json.loads(file.read_bytes())
        if before.pop("key") != run_key(before):
            raise ValueError("its key does not belong to its description")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{file} is damaged ({error!r}); choose another --output.") from error
    names = dict.fromkeys([*before, *description])
    changed = [name for name in names if before.get(name) != description.get(name)]
    if changed:
        differences = "; ".join(f"{name} was {before.get(name)} and is {description.get(name)}" for name in changed)
        raise UsageError(
            f"--output {file.parent} holds another training run: {differences}. Go on with the same options and "
            "collections, or choose another folder."
        )


def _best(evaluations: Sequence[Evaluation]) -> int:
    """Return the number of the first evaluation with the smallest forecast error."""
    errors = [_error(evaluation) for evaluation in evaluations]
    return errors.index(min(errors))


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {"step": evaluation.step, "train_loss": evaluation.train_loss, **evaluation.scores[WEIGHTS]}


def _error(evaluation: Evaluation) -> float:
    """Return the forecast error on the validation runs, infinite after a divergence."""
    error = evaluation.scores[WEIGHTS][FORECAST_ERROR]
    return math.inf if math.isnan(error) else error


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
