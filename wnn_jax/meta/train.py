"""Training nowcasters on collected trajectories."""

import csv
import dataclasses
import functools
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import wnn_jax
from wnn_jax._files import replace_on_success
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.forecast_error import forecast_errors, save_plot
from wnn_jax.meta.objectives import OBJECTIVES, Objective
from wnn_jax.meta.progress import Progress
from wnn_jax.meta.tasks import SplitName
from wnn_jax.meta.trajectories import Collection, Trajectory
from wnn_jax.meta.windows import Window, WindowSampler

_VALIDATION_SEED = 1_000_003
_VALIDATION_WINDOWS = 100  # of each role
_VALIDATION_SPLITS: tuple[SplitName, ...] = ("validation", "held-out architecture")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a nowcaster on collected trajectories."""

    collection: tuple[Path, ...]
    """Folders that `collect` filled."""
    output: Path
    """Folder for the nowcaster, its metrics and its checkpoints."""
    kind: Literal["wnn", "wnn-plus", "adaptive-linear"] = "adaptive-linear"
    """What to train: the paper's WNN, WNN+, or the linear extrapolation with coefficients chosen by a network."""
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
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""


class TrainState(NamedTuple):
    """What the training carries from step to step."""

    step: jax.Array
    params: Any
    opt_state: Any
    best_params: Any
    best_score: jax.Array


def train(options: Train) -> wnn_jax.Nowcaster:
    """Trains a nowcaster, and saves the best one as `nowcaster.npz` in the output folder.

    Raises:
      UsageError: if an option cannot be used, or the collection lacks what is needed.
    """
    _check(options)
    trajectories = [trajectory for folder in options.collection for trajectory in Collection(folder).trajectories()]
    names: tuple[SplitName, ...] = ("train", *_VALIDATION_SPLITS)
    splits: dict[SplitName, list[Trajectory]] = {
        split: [trajectory for trajectory in trajectories if trajectory.split == split] for split in names
    }
    for split, members in splits.items():
        if not members:
            folders = " ".join(map(str, options.collection))
            raise UsageError(f"--collection {folders} has no finished run for {split}; collect more runs.")
    roles = _roles_of(splits["train"])
    objective = OBJECTIVES[options.kind]
    batch_size = options.windows_per_role * len(roles)
    sampler = _sampler(options, objective, splits["train"], roles, seed=options.seed)
    validation = {split: _validation_batch(options, objective, splits[split], roles) for split in _VALIDATION_SPLITS}

    optimizer = objective.optimizer(options.num_steps, options.learning_rate)
    params = objective.init(jax.random.key(options.seed), roles)
    state = TrainState(
        jnp.zeros([], jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.array(jnp.inf)
    )
    metrics: list[dict[str, float]] = []
    seconds_before = 0.0

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Window) -> tuple[TrainState, jax.Array]:
        loss, gradient = jax.value_and_grad(objective.loss)(state.params, batch, roles)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    errors = jax.jit(objective.errors, static_argnums=2)
    options_of_manager = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with ocp.CheckpointManager((options.output / "checkpoints").absolute(), options=options_of_manager) as manager:
        if (latest := manager.latest_step()) is not None:
            if not options.resume:
                raise UsageError(
                    f"--output {options.output} has checkpoints. Go on with --resume, or choose another folder."
                )
            abstract = jax.eval_shape(lambda: state)
            restored = manager.restore(
                latest,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore()),
            )
            if restored["log"]["settings"] != _settings(options):
                raise UsageError(
                    f"--resume: the training in {options.output} had other settings: {restored['log']['settings']}."
                )
            state, metrics = restored["state"], restored["log"]["metrics"]
            seconds_before = metrics[-1]["seconds"]
        began = time.perf_counter()
        batches = sampler.batches(batch_size, start=int(state.step))
        losses: list[jax.Array] = []
        with Progress(options.kind, total=options.num_steps, completed=int(state.step)) as progress:
            while int(state.step) < options.num_steps and not _is_stuck(metrics, options.patience):
                state, loss = train_step(state, jax.tree.map(jnp.asarray, next(batches)))
                losses.append(loss)
                step = int(state.step)
                if step % options.validate_every and step != options.num_steps:
                    progress.advance()
                    continue
                row = {"step": float(step), "train_loss": float(jnp.stack(losses).mean())}
                losses.clear()
                for split, (batch, split_roles) in validation.items():
                    share = _mean(jax.device_get(errors(state.params, batch, split_roles)))
                    row |= {f"{split}, {horizon} ahead": float(share[horizon - 1]) for horizon in (1, 5, 20, 40)}
                    row[split] = float(np.nanmean(share))
                row["seconds"] = seconds_before + time.perf_counter() - began
                metrics.append(row)
                score = sum(row[split] for split in _VALIDATION_SPLITS) / len(_VALIDATION_SPLITS)
                if score < float(state.best_score):
                    state = state._replace(
                        best_params=jax.tree.map(jnp.copy, state.params), best_score=jnp.float32(score)
                    )
                items = {
                    "state": ocp.args.StandardSave(state),
                    "log": ocp.args.JsonSave({"metrics": metrics, "settings": _settings(options)}),
                }
                manager.save(step, args=ocp.args.Composite(**items))
                _save_metrics(metrics, options.output / "metrics.csv")
                progress.advance(metrics=f"loss {row['train_loss']:.4f}  validation {score:.4f}")
    record = {
        "kind": options.kind,
        "settings": _settings(options),
        "data": describe_data(options.collection, splits),
        "validation": {name: value for name, value in _best(metrics).items() if np.isfinite(value)},
        "versions": versions(),
    }
    nowcaster = objective.nowcaster(jax.device_get(state.best_params), record)
    wnn_jax.save(nowcaster, options.output / "nowcaster.npz")
    _plot_errors(options, nowcaster, [trajectory for split in _VALIDATION_SPLITS for trajectory in splits[split]])
    return nowcaster


def describe_data(collections: Sequence[Path], splits: dict[SplitName, list[Trajectory]]) -> dict[str, Any]:
    """What a nowcaster was trained on and what was held out, as JSON has it."""
    families = {Collection(folder).name: Collection(folder).manifest["family"] for folder in collections}

    def describe(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        tasks = [trajectory.task for trajectory in trajectories]
        return {
            "runs": len(tasks),
            "seeds": {name: sorted(t.index for t in trajectories if t.family == name) for name in families},
            "optimizer_steps": sum(task.num_steps for task in tasks),
            "architectures": sorted({f"{task.architecture} on {task.dataset}" for task in tasks}),
        }

    return {
        "families": families,
        **{split: describe(trajectories) for split, trajectories in splits.items()},
    }


def versions() -> dict[str, str]:
    """The versions behind a nowcaster."""
    return {
        "wnn_jax": wnn_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


def _check(options: Train) -> None:
    names = (
        "num_steps",
        "learning_rate",
        "windows_per_role",
        "num_weights",
        "min_stride",
        "max_stride",
        "validate_every",
        "patience",
    )
    for name in names:
        if getattr(options, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} must be positive.")
    if options.min_stride > options.max_stride:
        raise UsageError(f"--min-stride {options.min_stride} must not exceed --max-stride {options.max_stride}.")


def _settings(options: Train) -> dict[str, Any]:
    """What a training's result depends on, beside the data."""
    return {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("collection", "output", "resume")
    }


def _sampler(
    options: Train, objective: Objective, trajectories: Sequence[Trajectory], roles: tuple[str, ...], *, seed: int
) -> WindowSampler:
    return WindowSampler(
        trajectories=trajectories,
        roles=roles,
        statistics=objective.statistics,
        num_weights=options.num_weights,
        min_stride=options.min_stride,
        max_stride=options.max_stride,
        seed=seed,
    )


def _validation_batch(
    options: Train, objective: Objective, trajectories: Sequence[Trajectory], roles: tuple[str, ...]
) -> tuple[Window, tuple[str, ...]]:
    """The same windows for every nowcaster and every training, and the roles that take turns in them."""
    roles = tuple(role for role in _roles_of(trajectories) if role in roles)
    sampler = _sampler(options, objective, trajectories, roles, seed=_VALIDATION_SEED)
    windows = [sampler(index) for index in range(_VALIDATION_WINDOWS * len(roles))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *windows), roles


def _roles_of(trajectories: Sequence[Trajectory]) -> tuple[str, ...]:
    return tuple(sorted({leaf.role for trajectory in trajectories for leaf in trajectory.leaves}))


def _mean(errors: np.ndarray) -> np.ndarray:
    """The mean over windows at each horizon, NaN where there is none."""
    count = np.isfinite(errors).sum(axis=0)
    return np.where(count > 0, np.nansum(errors, axis=0) / np.maximum(count, 1), np.nan)


def _plot_errors(options: Train, nowcaster: wnn_jax.Nowcaster, held_out: Sequence[Trajectory]) -> None:
    """Draws the error against the horizon, beside the linear fit and half of it."""
    linear = wnn_jax.load("linear")
    arms = ((options.kind, nowcaster, 1.0), ("linear", linear, 1.0), ("linear@0.5", linear, 0.5))
    found = (rows for label, drawn, scale in arms for rows in forecast_errors(label, drawn, scale, held_out))
    save_plot([row for rows in found for row in rows], options.output / "forecast-errors.png")


def _best(metrics: list[dict[str, float]]) -> dict[str, float]:
    return min(metrics, key=lambda row: sum(row[split] for split in _VALIDATION_SPLITS))


def _is_stuck(metrics: list[dict[str, float]], patience: int) -> bool:
    scores = [sum(row[split] for split in _VALIDATION_SPLITS) for row in metrics]
    return len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def _save_metrics(metrics: list[dict[str, float]], path: Path) -> None:
    with replace_on_success(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(metrics[0]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in metrics)
