"""Training nowcasters on collected trajectories."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import optax
import tyro

import wnn_jax
from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError, check_options, look_up
from wnn_jax.lab.forecasting.forecasting_task import FORECAST_ERROR, ForecastingTask
from wnn_jax.lab.forecasting.kinds import KINDS, NowcasterKind
from wnn_jax.lab.forecasting.trajectories import Trajectory, load_trajectories
from wnn_jax.lab.jobs import lock
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.progress import Progress
from wnn_jax.lab.training.evaluation_weights import WEIGHTS
from wnn_jax.lab.training.keys import RESULTS_VERSION, describe_differences, run_key, versions
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
    validate_every: int = 250
    """Steps between validations."""
    patience: int = 8
    """Validations without an improvement after which training stops."""
    seed: int = 0
    """Decides the initial weights and the windows."""


def train(options: Train) -> wnn_jax.Nowcaster:
    """Train a nowcaster, keep the best one as `nowcaster.npz` in the output folder, and return it.

    A `UsageError` says that an option or a collection cannot be used, that the output folder holds another training
    run, or that the training run diverged at once.
    """
    settings = {name: value for name, value in vars(options).items() if name not in ("collection", "output")}
    check_options(options, positive=[name for name in settings if name not in ("kind", "seed")])
    kind = look_up(KINDS, options.kind, "--kind")
    trajectories = load_trajectories(options.collection)
    task = ForecastingTask(
        kind, trajectories, windows_per_role=options.windows_per_role, num_weights=options.num_weights
    )
    description = {"results_version": RESULTS_VERSION, **settings, **task.describe()}
    record = {
        "kind": options.kind,
        "settings": settings,
        "data": describe_data(task.trajectories),
        "versions": versions(),
        "training": run_key(description),
    }
    with _locked_folder(options.output, description):
        file = options.output / "nowcaster.npz"
        evaluations = _fit(options, task, _keep_best(kind, file, record, options.patience))
        if not any(math.isfinite(_error(each)) for each in evaluations):
            raise UsageError(
                f"--learning-rate {options.learning_rate}: the training run diverged before the first validation; "
                "choose a smaller one, and another --output."
            )
        nowcaster = _load_best(file, record, min(evaluations, key=_error).step)
        # Nothing is left to decide, so the test runs may be seen.
        test = Program(task, optax.identity()).evaluate(nowcaster.params, {}, "test")
        nowcaster = dataclasses.replace(nowcaster, record={**nowcaster.record, "test": _finite(test)})
        wnn_jax.save(nowcaster, file)
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


def _keep_best(
    kind: NowcasterKind, file: Path, record: Mapping[str, Any], patience: int
) -> Callable[[TrainState, Sequence[Evaluation]], bool]:
    """Make a function that keeps the best nowcaster so far in a file, and says when to stop."""

    # The trainer calls it before it saves the checkpoint. So the file holds the best nowcaster of all evaluations in
    # the checkpoint, or of a later evaluation, which a resumed run repeats bit for bit.
    def select(state: TrainState, evaluations: Sequence[Evaluation]) -> bool:
        rows = [{"step": each.step, "train_loss": each.train_loss, **each.scores[WEIGHTS]} for each in evaluations]
        timed = [{**row, "seconds": each.seconds} for row, each in zip(rows, evaluations, strict=True)]
        save_rows(timed, file.parent / "metrics.csv")
        best = min(evaluations, key=_error)
        if best is evaluations[-1] and math.isfinite(_error(best)):
            nowcaster = kind.nowcaster(jax.device_get(state.params), record={**record, "validation": _finite(rows[-1])})
            wnn_jax.save(nowcaster, file)
        return len(evaluations) - 1 - evaluations.index(best) >= patience

    return select


def _load_best(file: Path, record: Mapping[str, Any], step: int) -> Any:
    """Load the nowcaster that `_keep_best` kept at a step. Another one is a `UsageError`."""
    with contextlib.suppress(ValueError, FileNotFoundError, AttributeError, KeyError):
        nowcaster: Any = wnn_jax.load(file)
        if (nowcaster.record["training"], nowcaster.record["validation"]["step"]) == (record["training"], step):
            return nowcaster
    raise UsageError(
        f"{file} is not the nowcaster that this training run kept at step {step}; train again with another --output."
    )


def _fit(
    options: Train, task: ForecastingTask, stop: Callable[[TrainState, Sequence[Evaluation]], bool]
) -> list[Evaluation]:
    """Train, or go on, until `stop` says so."""
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
        fitted = trainer.fit(options.seed, folder, report=report, stop=stop, checkpoint_seconds=0.0, test=False)
    return fitted.evaluations


@contextlib.contextmanager
def _locked_folder(folder: Path, description: Mapping[str, Any]) -> Generator[None]:
    """Keep other processes out of the output folder, and refuse a folder of another training run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "training.json"
    with lock(file) as is_granted:
        if not is_granted:
            raise UsageError(f"--output {folder}: another process trains there. Wait for it, or choose another folder.")
        if not any((folder / name).exists() for name in (file.name, "checkpoints", "nowcaster.npz")):
            with replace_on_success(file) as temporary:
                temporary.write_text(json.dumps(description, indent=1) + "\n")
        try:
            changed = describe_differences({**json.loads(file.read_bytes())}, description)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"--output {folder} holds a training run of another version, or {file.name} is damaged ({error!r}); "
                "choose another folder."
            ) from error
        if changed:
            raise UsageError(
                f"--output {folder} holds another training run: {'; '.join(changed)}. Go on with the same options and "
                "collections, or choose another folder."
            )
        yield


def _error(evaluation: Evaluation) -> float:
    """Return the forecast error on the validation runs, infinite after a divergence."""
    error = evaluation.scores[WEIGHTS][FORECAST_ERROR]
    return math.inf if math.isnan(error) else error


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
