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
from wnn_jax.lab.forecasting.collection import Collection, Trajectory, verified_trajectories
from wnn_jax.lab.forecasting.forecast_error import forecast_errors, plot_forecast_errors
from wnn_jax.lab.forecasting.forecasting import EVALUATED_SPLITS, FORECAST_ERROR, Forecasting, by_split
from wnn_jax.lab.forecasting.objectives import OBJECTIVES, Objective
from wnn_jax.lab.jobs_claims import claim
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.tasks.families import SplitName
from wnn_jax.lab.training.evaluation_weights import WEIGHTS
from wnn_jax.lab.training.keys import describe_differences, describe_task, run_key, versions
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import TrainState
from wnn_jax.lab.training.trainer import Evaluation, Trainer
from wnn_jax.nowcasters import CurveFit

# Every kind of nowcaster that can be trained, with what it is trained to do.
KINDS: Mapping[str, Objective] = OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a nowcaster on collected trajectories.

    The nowcaster with the smallest forecast error on the validation runs is kept, and scored once on the test runs.
    Called again with the same options, an interrupted training goes on, to the same nowcaster.
    """

    collection: tuple[Path, ...]
    """Folders that `collect` filled."""
    output: Path
    """Folder for the nowcaster, its metrics, a plot of its errors and the checkpoints."""
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
    average: bool = False
    """Train on running means of the weights, with a memory of one spacing, for `nowcast(average=...)`."""
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
    """Trains a nowcaster, and keeps the best one as `nowcaster.npz` in the output folder.

    Returns:
      The nowcaster, with its record.

    Raises:
      UsageError: if an option cannot be used, a collection lacks what is needed or is damaged, the output folder holds
        another training, or the training diverges at once.
    """
    check_options(options, positive=_POSITIVE)
    if options.min_stride > options.max_stride:
        raise UsageError(f"--min-stride {options.min_stride} must not exceed --max-stride {options.max_stride}.")
    objective = look_up(KINDS, options.kind, "--kind")
    splits = by_split(verified_trajectories(options.collection))
    task = _make_task(options, objective, splits)
    description = _describe(options, task)
    record = {
        "kind": options.kind,
        "settings": _settings(options),
        "data": describe_data(options.collection, task.used),
        "versions": versions(),
        "training": run_key(description),
    }
    with claimed_folder(options.output, description):
        selection = _Selection(task.objective, options.output, record, options.patience)
        evaluations = _fit(options, task, selection)
        _save_metrics(evaluations, options.output)
        nowcaster = selection.selected(evaluations)
        validation_runs = [trajectory for split in EVALUATED_SPLITS["validation"] for trajectory in task.used[split]]
        _plot_errors(options, nowcaster, validation_runs)
        # Only now, when nothing is left to decide.
        test = Program(task, optax.identity).evaluate(nowcaster.params, {}, "test")
        nowcaster = dataclasses.replace(nowcaster, record={**nowcaster.record, "test": _finite(test)})
        wnn_jax.save(nowcaster, selection.file)
    return nowcaster


def _make_task(options: Train, objective: Objective, splits: Mapping[SplitName, Sequence[Trajectory]]) -> Forecasting:
    settings = {name: getattr(options, name) for name in ("num_weights", "min_stride", "max_stride", "average")}
    return Forecasting(objective=objective, trajectories=splits, windows_per_role=options.windows_per_role, **settings)


def describe_data(collections: Sequence[Path], splits: Mapping[SplitName, Sequence[Trajectory]]) -> dict[str, Any]:
    """What a nowcaster was trained, selected and scored on, of what JSON has."""
    families = {collection.name: collection.manifest["family"] for collection in map(Collection, collections)}

    def describe(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        runs = [trajectory.settings for trajectory in trajectories]
        return {
            "runs": len(runs),
            "seeds": {name: sorted(t.index for t in trajectories if t.family == name) for name in families},
            "optimizer_steps": sum(run.num_steps for run in runs),
            "architectures": sorted({f"{run.architecture} on {run.dataset}" for run in runs}),
        }

    return {"families": families, **{split: describe(trajectories) for split, trajectories in splits.items()}}


class _Selection:
    """Keeps the best nowcaster so far in a file, and ends the training when nothing improves any more.

    It is called after every evaluation, and before the checkpoint. So the file holds the best nowcaster of all
    evaluations that a checkpoint knows, or that of a later evaluation, which the resumed training repeats bit for bit.
    """

    def __init__(self, objective: Objective, folder: Path, record: Mapping[str, Any], patience: int) -> None:
        self.file = folder / "nowcaster.npz"
        self._objective = objective
        self._record = record
        self._patience = patience

    def __call__(self, state: TrainState, evaluations: Sequence[Evaluation]) -> bool:
        """Whether to stop."""
        _save_metrics(evaluations, self.file.parent)
        best = _best(evaluations)
        if best == len(evaluations) - 1 and math.isfinite(_error(evaluations[best])):
            record = {**self._record, "validation": _finite(_figures(evaluations[best]))}
            wnn_jax.save(self._objective.nowcaster(jax.device_get(state.params), record), self.file)
        return len(evaluations) - 1 - best >= self._patience

    def selected(self, evaluations: Sequence[Evaluation]) -> Any:
        """The best nowcaster.

        Raises:
          UsageError: if the training diverged before there was any, or another one is in the file.
        """
        best = evaluations[_best(evaluations)]
        if not math.isfinite(_error(best)):
            raise UsageError(
                f"--learning-rate {self._record['settings']['learning_rate']}: the training diverged before the first "
                "validation; choose a smaller one, and another --output."
            )
        try:
            nowcaster: Any = wnn_jax.load(self.file)
            record = nowcaster.record
            is_expected = record["training"] == self._record["training"]
            is_expected &= record["validation"]["step"] == best.step
        except (ValueError, FileNotFoundError, AttributeError, KeyError):
            is_expected, nowcaster = False, None
        if not is_expected:
            raise UsageError(
                f"{self.file} is not the nowcaster that this training kept at step {best.step}; train again with "
                "another --output."
            )
        return nowcaster


def _fit(options: Train, task: Forecasting, selection: _Selection) -> list[Evaluation]:
    """Trains, or goes on, until the selection says that nothing improves any more."""
    trainer = Trainer(
        task,
        Method(options.kind, task.objective.optimizer),
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

        # At every evaluation: the networks are small, and what is lost is at most the time between two evaluations.
        fitted = trainer.fit(
            options.seed,
            options.output / "checkpoints",
            report=report,
            stop=selection,
            checkpoint_seconds=0.0,
            test=False,
        )
    return fitted.evaluations


def _settings(options: Train) -> dict[str, Any]:
    """The options that a training's result depends on, beside the data."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in ("collection", "output")}


def _describe(options: Train, task: Forecasting) -> dict[str, Any]:
    """All that the nowcaster depends on, of what JSON has."""
    described = describe_task(task)
    return {
        "settings": {name: value for name, value in _settings(options).items() if name not in described},
        "collection": described.pop("runs"),
        "task": described,
        "versions": versions(),
    }


@contextlib.contextmanager
def claimed_folder(folder: Path, description: Mapping[str, Any]) -> Generator[None]:
    """Keeps other processes from training in the output folder, which says what is trained there.

    Raises:
      UsageError: if another process trains there, or something else was trained there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "training.json"
    with claim(file) as is_granted:
        if not is_granted:
            raise UsageError(f"--output {folder}: another process trains there. Wait for it, or choose another folder.")
        if file.exists():
            _check_same_training(file, description)
        elif (folder / "checkpoints").exists() or (folder / "nowcaster.npz").exists():
            raise UsageError(
                f"--output {folder} holds a training of another version of wnn_jax; choose another folder."
            )
        else:
            with replace_on_success(file) as temporary:
                content = {"key": run_key(description), "description": description}
                temporary.write_text(json.dumps(content, indent=1) + "\n")
        yield


def _check_same_training(file: Path, description: Mapping[str, Any]) -> None:
    try:
        before = json.loads(file.read_bytes())
        key, trained = before["key"], before["description"]
        if run_key(trained) != key:
            raise ValueError("its key is not that of its description")
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{file} is damaged ({error!r}); choose another --output.") from error
    if key != run_key(description):
        differences = "; ".join(describe_differences(trained, description))
        raise UsageError(
            f"--output {file.parent} holds another training: {differences}. Go on with the options and collections of "
            "that one, or choose another folder."
        )


def _save_metrics(evaluations: Sequence[Evaluation], folder: Path) -> None:
    rows = [{**_figures(evaluation), "seconds": evaluation.seconds} for evaluation in evaluations]
    save_rows(rows, folder / "metrics.csv")


def _best(evaluations: Sequence[Evaluation]) -> int:
    """The number of the first evaluation with the smallest forecast error."""
    errors = [_error(evaluation) for evaluation in evaluations]
    return errors.index(min(errors))


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {"step": evaluation.step, "train_loss": evaluation.train_loss, **evaluation.scores[WEIGHTS]}


def _error(evaluation: Evaluation) -> float:
    """The forecast error on the validation runs, infinite after a divergence."""
    error = evaluation.scores[WEIGHTS][FORECAST_ERROR]
    return math.inf if math.isnan(error) else error


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _plot_errors(options: Train, nowcaster: wnn_jax.Nowcaster, trajectories: Sequence[Trajectory]) -> None:
    """Draws the error against the horizon, beside that of the linear fit and of half of it."""
    linear = CurveFit("linear")
    methods = ((options.kind, nowcaster, 1.0), ("linear", linear, 1.0), ("linear@0.5", linear, 0.5))
    rows = [
        row
        for label, drawn, scale in methods
        for rows_of_run in forecast_errors(label, drawn, scale, trajectories, average=options.average)
        for row in rows_of_run
    ]
    plot_forecast_errors(rows, options.output / "forecast-errors.png")
