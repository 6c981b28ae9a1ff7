"""One training run: resumable, and a pure function of the arm, the task and the seed."""

import dataclasses
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from wnn_jax._files import replace_on_success
from wnn_jax.meta.arms import Arm
from wnn_jax.meta.datasets import Dataset, Split

Augment = Callable[[jax.Array, jax.Array], jax.Array]

_EVALUATION_BATCH = 500
_STEPS_BETWEEN_REPORTS = 25


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: everything that the arms of a comparison have in common.

    Attributes:
      dataset: the data.
      model: maps images `[n, height, width, channels]` to logits `[n, num_classes]`, or tokens `[n, length]` to
        `[n, length, num_classes]`.
      augment: `(key, images in [0, 1]) -> images`, or `None`.
      batch_size: images per step.
      num_epochs: length of a run, in passes over the training images (an incomplete last batch is left out).
      learning_rate: Adam's.
      snapshot_every: steps between the nowcast's snapshots.
      evaluate_every: steps between evaluations.
      ema_decay: per step, of the moving average of the weights that is evaluated beside them.
    """

    dataset: Dataset
    model: nn.Module
    augment: Augment | None
    batch_size: int
    num_epochs: int
    learning_rate: float
    snapshot_every: int
    evaluate_every: int
    ema_decay: float

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set."""
        return len(self.dataset.train.targets) // self.batch_size

    @property
    def num_steps(self) -> int:
        """Length of a run in optimizer steps."""
        return self.num_epochs * self.steps_per_epoch


class TrainState(NamedTuple):
    """Everything that a run carries from step to step."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


class Evaluation(NamedTuple):
    """What is known of a run after some step. Accuracies are on the validation images, in [0, 1]."""

    step: int
    epoch: float
    seconds: float
    train_loss: float
    accuracy: float
    accuracy_ema: float
    num_nowcasts: int
    num_rejected: int


Report = Callable[[int, float, Evaluation | None], None]


class Trainer:
    """Compiles an arm's training once, for runs with several seeds."""

    def __init__(self, task: Task, arm: Arm, *, scan: bool | None = None) -> None:
        """Builds the optimizer.

        Args:
          task: what all arms have in common.
          arm: how this one trains.
          scan: whether the steps between two evaluations are one `lax.scan`. Default: yes, but on CPU, where
            convolutions in a loop of the compiled program are some 20 times slower.
        """
        self.task = task
        self.arm = arm
        self._optimizer = arm.optimizer(
            learning_rate=task.learning_rate, num_steps=task.num_steps, snapshot_every=task.snapshot_every
        )
        self._scans = jax.default_backend() != "cpu" if scan is None else scan
        self._train = jax.jit(self._train_block if self._scans else self._train_step, donate_argnums=0)
        self._predict = jax.jit(self._logits)
        self._compiled: dict[Any, Any] = {}

    def init(self, seed: int) -> TrainState:
        """The state before the first step."""
        inputs = self.task.dataset.preprocess(self.task.dataset.train.inputs[:1])
        params = self.task.model.init(jax.random.key(seed), inputs)["params"]
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            opt_state=self._optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params),
        )

    def run(self, seed: int, folder: Path, report: Report, checkpoint_seconds: float) -> dict[str, Any]:
        """Trains, or goes on from the last checkpoint in `folder`.

        Args:
          seed: decides the initial weights, the order of the data and the augmentation.
          folder: where the checkpoints are.
          report: called with (step, training loss, evaluation or `None`) now and then.
          checkpoint_seconds: a checkpoint is saved at the first evaluation this long after the last one.

        Returns:
          The result, as JSON has it.
        """
        task = self.task
        train = tuple(map(jnp.asarray, task.dataset.train))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state = self.init(seed)
        evaluations: list[Evaluation] = []
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
            if (latest := manager.latest_step()) is not None:
                restored = manager.restore(
                    latest,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(jax.eval_shape(lambda: state)),
                        evaluations=ocp.args.JsonRestore(),
                    ),
                )
                state = restored["state"]
                evaluations = [Evaluation(*evaluation) for evaluation in restored["evaluations"]["evaluations"]]
            seconds = evaluations[-1].seconds if evaluations else 0.0
            step = int(state.step)
            saved = time.monotonic()
            while step < task.num_steps:
                end = min((step // task.evaluate_every + 1) * task.evaluate_every, task.num_steps)
                losses = []
                for block in self._blocks(seed, step, end):
                    compiled = self._compile(state, train, block, key)
                    began = time.perf_counter()
                    state, loss = compiled(state, *train, block, key)
                    losses.append(loss)
                    step += 1 if block.ndim == 1 else len(block)
                    if step % _STEPS_BETWEEN_REPORTS == 0 or step == end:
                        loss.block_until_ready()
                        report(step, float(loss), None)
                    seconds += time.perf_counter() - began
                evaluation = Evaluation(
                    step=step,
                    epoch=step / task.steps_per_epoch,
                    seconds=seconds,
                    train_loss=float(np.mean(jax.device_get(losses))),
                    accuracy=self._accuracy(state.params, task.dataset.validation),
                    accuracy_ema=self._accuracy(state.ema, task.dataset.validation),
                    num_nowcasts=int(optax.tree.get(state.opt_state, "num_nowcasts", 0)),
                    num_rejected=int(optax.tree.get(state.opt_state, "num_rejected", 0)),
                )
                evaluations.append(evaluation)
                if time.monotonic() - saved >= checkpoint_seconds:
                    items: dict[str, Any] = {
                        "state": ocp.args.StandardSave(state),
                        "evaluations": ocp.args.JsonSave({"evaluations": evaluations}),
                    }
                    manager.save(step, args=ocp.args.Composite(**items))
                    saved = time.monotonic()
                report(step, evaluation.train_loss, evaluation)
        return {
            "arm": self.arm.label,
            "seed": seed,
            "evaluations": [evaluation._asdict() for evaluation in evaluations],
            "test_accuracy": self._accuracy(state.params, task.dataset.test),
            "test_accuracy_ema": self._accuracy(state.ema, task.dataset.test),
            "weights_sha256": _digest(state.params),
            "settings": describe(task),
            "environment": environment(),
        }

    def _train_step(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array, indices: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        augment = self.task.augment
        if augment is not None:
            augment = functools.partial(augment, jax.random.fold_in(key, state.step))

        def loss_fn(params: Any) -> jax.Array:
            batch = self.task.dataset.preprocess(inputs[indices], augment)
            logits = self._apply(params, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets[indices]).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = self._optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - self.task.ema_decay)
        return TrainState(state.step + 1, params, opt_state, ema), loss

    def _train_block(
        self, state: TrainState, inputs: jax.Array, targets: jax.Array, indices: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        state, losses = jax.lax.scan(
            lambda state, batch: self._train_step(state, inputs, targets, batch, key), state, indices
        )
        return state, losses.mean()

    def _blocks(self, seed: int, start: int, end: int) -> Iterator[np.ndarray]:
        """The image indices of the steps from `start` to `end`: `[batch]` each, or all at once `[steps, batch]`."""
        steps = self._batches(seed, start, end)
        return iter([np.stack(list(steps))]) if self._scans else steps

    def _batches(self, seed: int, start: int, end: int) -> Iterator[np.ndarray]:
        per_epoch, size = self.task.steps_per_epoch, self.task.batch_size
        order, order_epoch = np.empty(0, np.int32), -1
        for step in range(start, end):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng([seed, epoch])
                order, order_epoch = rng.permutation(len(self.task.dataset.train.targets)).astype(np.int32), epoch
            yield order[position * size : (position + 1) * size]

    def _compile(self, state: TrainState, train: tuple[jax.Array, ...], block: np.ndarray, key: jax.Array) -> Any:
        # Ahead of time, so that the seconds of a run are those of its steps alone.
        if block.shape not in self._compiled:
            self._compiled[block.shape] = self._train.lower(state, *train, block, key).compile()
        return self._compiled[block.shape]

    def _apply(self, params: Any, batch: jax.Array) -> jax.Array:
        logits = self.task.model.apply({"params": params}, batch)
        assert isinstance(logits, jax.Array)
        return logits

    def _logits(self, params: Any, inputs: jax.Array) -> jax.Array:
        return self._apply(params, self.task.dataset.preprocess(inputs))

    def _accuracy(self, params: Any, split: Split) -> float:
        batches = range(0, len(split.targets), _EVALUATION_BATCH)
        logits = [self._predict(params, split.inputs[start : start + _EVALUATION_BATCH]) for start in batches]
        return float(np.mean(np.concatenate(jax.device_get(logits)).argmax(axis=-1) == split.targets))


def save_json(content: dict[str, Any], path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    with replace_on_success(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def describe(task: Task) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as JSON has them."""
    settings = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.name not in ("dataset", "model", "augment")
    }
    images = task.dataset.train.inputs
    return settings | {
        "model": repr(task.model).replace("\n", " "),
        "augment": task.augment is not None,
        "image_shape": list(images.shape[1:]),
        "num_train": len(images),
        "num_validation": len(task.dataset.validation.targets),
    }


def environment() -> dict[str, str]:
    """The hardware and the versions behind a run's numbers."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def _digest(params: Any) -> str:
    """One hash of all weights, to tell at a glance whether two runs ended in the same place."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
