"""What makes a result, in one hash: results are found by it, and never mistaken for those of anything else."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import platform
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import optax

import wnn_jax
from wnn_jax.lab.tasks.task import Task, check_outputs
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.step import TrainState, init_state

# Raise it when the numbers of a run change on purpose. Results of another version are stale.
RESULTS_VERSION = 1

# Seeds and steps of the training batches that a task's fingerprint looks at.
_SAMPLED_BATCHES = ((0, 0), (0, 1), (0, 1_000), (1, 0), (2, 10_000))

_ADDRESS = re.compile(r"\b(at )?0x[0-9a-f]+")


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    return {
        "wnn_jax": wnn_jax.__version__.partition(".dev")[0],
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
    }


def environment() -> dict[str, str]:
    """The hardware and the software that a run was made on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions(),
    }


def describe_task(task: Task) -> dict[str, Any]:
    """A task's own description, and a fingerprint of all that it computes.

    The fingerprint is of its initial parameters, its loss and its metrics as JAX traces them, every operation and every
    number, of all evaluation batches and of some training batches. So a task whose code or data is changed is another
    one, even where it says nothing of that itself.

    Raises:
      UsageError: if the task's methods do not return what the protocol says.
    """
    check_outputs(task)
    key = jax.random.key(0)
    params, model_state = jax.eval_shape(task.init, key)
    digest = hashlib.sha256()
    _add_computation(digest, task.init, key)
    evaluation_batches = [*task.evaluation_batches("validation"), *task.evaluation_batches("test")]
    training_batches = [task.batch(seed, step) for seed, step in _SAMPLED_BATCHES]
    _add_computation(digest, task.loss, params, model_state, training_batches[0], key)
    _add_computation(digest, task.measure, params, model_state, evaluation_batches[0])
    for leaf in jax.tree.leaves((evaluation_batches, training_batches)):
        digest.update(np.asarray(leaf).tobytes())
    for metric in task.metrics:
        digest.update(f"{metric.name} {metric.higher_is_better} {_describe_code(metric.from_mean)}".encode())
    return {**task.describe(), "fingerprint": digest.hexdigest()}


def describe_method(method: Method, task: Task, learning_rate: float, num_steps: int) -> dict[str, Any]:
    """A method's name, and a fingerprint of all that it computes.

    The fingerprint is of the optimizer as JAX traces it for the task's parameters: every operation, every number and,
    of a nowcaster, every weight. So a recipe that is changed, or a nowcaster that is trained again, is another one,
    whatever its name. Views, readings and further stages enter with their source code.

    Args:
      method: how the task is trained.
      task: what is trained.
      learning_rate: given to the method.
      num_steps: given to the method.
    """
    trained = method.task(task)
    tx = method.optimizer(learning_rate, num_steps)

    def state(key: jax.Array) -> TrainState:
        return init_state(trained, tx, key, method.view)

    abstract = jax.eval_shape(state, jax.random.key(0))
    gradient, _ = jax.eval_shape(method.view.read, abstract)
    digest = hashlib.sha256()
    _add_computation(digest, tx.init, abstract.params)
    _add_computation(digest, tx.update, gradient, abstract.opt_state, abstract.params)
    readings = [part for name, reading in sorted(method.readings.items()) for part in (name, reading.params)]
    for part in (method.view, *method.stages, *readings):
        digest.update(_describe_code(part).encode())
    description: dict[str, Any] = {"name": method.name, "fingerprint": digest.hexdigest()}
    if method.nowcaster is not None:
        description["nowcaster"] = method.nowcaster
    if trained is not task:
        description["task"] = dict(trained.describe())
    return description


def run_key(description: Mapping[str, Any]) -> str:
    """One hash of all that makes a result, of what JSON has."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def describe_differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two descriptions differ, a line for each place.

    Args:
      old: what a result was made by, as read from JSON.
      new: what is asked for.
      name: where in a description these are.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in describe_differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    is_same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if is_same else [f"{name} was {_shorten(old)} and is {_shorten(new)}"]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _add_computation(digest: Any, function: Any, *arguments: Any) -> None:
    """Adds what a function computes: its operations, and the arrays that it closes over."""
    closed = jax.make_jaxpr(function)(*arguments)
    digest.update(_without_addresses(str(closed)).encode())
    for constant in _constants(closed):
        digest.update(np.asarray(constant).tobytes())


def _constants(closed: Any) -> list[Any]:
    """All constants of a computation, those of its parts included."""
    constants = list(getattr(closed, "consts", ()))
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                constants += _constants(value)
    return constants


def _describe_code(part: Any) -> str:
    """What an object is made by: its values, and the source of its class and of the functions that it holds."""
    values = vars(part).values() if dataclasses.is_dataclass(part) else ()
    holders = [part if inspect.isroutine(part) else type(part), *filter(inspect.isroutine, values)]
    texts = [_without_addresses(repr(part))]
    for holder in holders:
        # What was typed into an interpreter has no source.
        with contextlib.suppress(OSError, TypeError):
            texts.append(inspect.getsource(holder))
    return "\n".join(texts)


def _without_addresses(text: str) -> str:
    return _ADDRESS.sub("", text)
