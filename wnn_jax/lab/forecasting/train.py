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
from wnn_jax.lab.forecasting.kinds import KINDS, NowcasterKind
from wnn_jax.lab.forecasting.task import FORECAST_ERROR, ForecastingTask
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories
from wnn_jax.lab.jobs import lock
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.training.evaluation_weights import WEIGHTS
from wnn_jax.lab.training.keys import RESULTS_VERSION, run_key, versions
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.program import Program
from wnn_jax.lab.training.step import TrainState
from wnn_jax.lab.training.trainer import Evaluation, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a nowcaster on collected trajectories.

    The nowcaster with the smallest forecast error on the validation runs is kept, and scored once on the test runs.
    Call it again with the same options to go on with an interrupted training run, to the same nowcaster.
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


_WINDOW_OPTIONS = ("windows_per_role", "num_weights", "min_stride", "max_stride")
_POSITIVE = ("num_steps", "learning_rate", *_WINDOW_OPTIONS, "validate_every", "patience")


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
    kind = look_up(KINDS, options.kind, "--kind")
    trajectories = load_trajectories(options.collection)
    settings = {name: value for name, value in vars(options).items() if name not in ("collection", "output")}
    task = ForecastingTask(kind, trajectories, **{name: settings[name] for name in _WINDOW_OPTIONS})
    description = {"results_version": RESULTS_VERSION, **settings, **task.describe()}
    record = {
        "kind": options.kind,
        "settings": settings,
        "data": describe_data(task.trajectories),
        "versions": versions(),
        "training": run_key(description),
    }
    with _locked_folder(options.output, description):
        selection = _Selection(kind, options.output, record, options.patience)
        nowcaster = selection.best_nowcaster(_fit(options, task, selection))
        # Nothing is left to decide, so the test runs may be seen.
        test = Program(task, optax.identity()).evaluate(nowcaster.params, {}, "test")
        nowcaster = dataclasses.replace(nowcaster, record={**nowcaster.record, "test": _finite(test)})
        wnn_jax.save(nowcaster, selection.file)
    return nowcaster


def describe_data(splits: Mapping[Any, Sequence[Trajectory]]) -> dict[str, Any]:
    """Describe the runs of every split for the record of a nowcaster, in types that JSON has."""
    families = {run.family.name: dataclasses.asdict(run.family) for runs in splits.values() for run in runs}
    data: dict[str, Any] = {"families": families}
    for split, runs in splits.items():
        data[split] = {
            "runs": len(runs),
            "seeds": {name: sorted(run.index for run in runs if run.family.name == name) for name in families},
            "optimizer_steps": sum(run.settings.num_steps for run in runs),
            "architectures": sorted({f"{run.settings.architecture} on {run.settings.dataset}" for run in runs}),
        }
    return data


class _Selection:
    """Keeps the best nowcaster so far in a file, and ends the training run when nothing improves any more.

    The trainer calls it after every evaluation and before it saves the checkpoint. So the file holds the best nowcaster
    of all evaluations in the checkpoint, or of a later evaluation, which a resumed run repeats bit for bit.
    """

    def __init__(self, kind: NowcasterKind, folder: Path, record: Mapping[str, Any], patience: int) -> None:
        self.file = folder / "nowcaster.npz"
        self._kind = kind
        self._record = record
        self._patience = patience

    def __call__(self, state: TrainState, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether to stop."""
        rows = [{"step": each.step, "train_loss": each.train_loss, **each.scores[WEIGHTS]} for each in evaluations]
        seconds = ({"seconds": each.seconds} for each in evaluations)
        save_rows([row | time for row, time in zip(rows, seconds, strict=True)], self.file.parent / "metrics.csv")
        best = min(evaluations, key=_error)
        if best is evaluations[-1] and math.isfinite(_error(best)):
            record = {**self._record, "validation": _finite(rows[-1])}
            wnn_jax.save(self._kind.nowcaster(jax.device_get(state.params), record=record), self.file)
        return len(evaluations) - 1 - evaluations.index(best) >= self._patience

    def best_nowcaster(self, evaluations: Sequence[Evaluation]) -> Any:
        """Load the best nowcaster."""
        best = min(evaluations, key=_error)
        if not math.isfinite(_error(best)):
            raise UsageError(
                f"--learning-rate {self._record['settings']['learning_rate']}: the training run diverged before the "
                "first validation; choose a smaller one, and another --output."
            )
        with contextlib.suppress(ValueError, FileNotFoundError, AttributeError, KeyError):
            nowcaster: Any = wnn_jax.load(self.file)
            record = nowcaster.record
            if (record["training"], record["validation"]["step"]) == (self._record["training"], best.step):
                return nowcaster
        raise UsageError(
            f"{self.file} is not the nowcaster that this training run kept at step {best.step}; train again with "
            "another --output."
        )


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
    folder = options.output / "checkpoints"
    with Progress(options.kind, total=options.num_steps) as progress:

        def report(step: int, loss: float, evaluation: Evaluation | None) -> None:
            if evaluation is not None:
                error = evaluation.scores[WEIGHTS][FORECAST_ERROR]
                progress.advance_to(step, f"loss {loss:.4f}  validation {error:.4f}")
            elif step % options.validate_every and step < options.num_steps:  # Else the evaluation follows.
                progress.advance_to(step, f"loss {loss:.4f}")

        # The networks are small, so every evaluation saves a checkpoint.
        fitted = trainer.fit(options.seed, folder, report=report, stop=selection, checkpoint_seconds=0.0, test=False)
    return fitted.evaluations


@contextlib.contextmanager
def _locked_folder(folder: Path, description: Mapping[str, Any]) -> Generator[None]:
    """Keep other processes out of the output folder, and refuse a folder of another training run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "training.json"
    with lock(file) as is_granted:
        if not is_granted:
            raise UsageError(f"--output {folder}: another process trains there. Wait for it, or choose another folder.")
        if any((folder / name).exists() for name in (file.name, "checkpoints", "nowcaster.npz")):
            _check_same_run(file, description)
        else:
            with replace_on_success(file) as temporary:
                temporary.write_text(json.dumps(description, indent=1) + "\n")
        yield


def _check_same_run(file: Path, description: Mapping[str, Any]) -> None:
    try:
        before: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        is_current = before.get("results_version") == description["results_version"]
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{file} is damaged ({error!r}); choose another --output.") from error
    if not is_current:
        raise UsageError(f"--output {file.parent} holds a training run of another version; choose another folder.")
    if names := [name for name in description if before.get(name) != description[name]]:
        changes = "; ".join(f"{name} was {before.get(name)} and is {description[name]}" for name in names)
        raise UsageError(
            f"--output {file.parent} holds another training run: {changes}. Go on with the same options and "
            "collections, or choose another folder."
        )


def _error(evaluation: Evaluation) -> float:
    """Return the forecast error on the validation runs, infinite after a divergence."""
    error = evaluation.scores[WEIGHTS][FORECAST_ERROR]
    return math.inf if math.isnan(error) else error


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
