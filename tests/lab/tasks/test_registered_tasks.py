import contextlib
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import optax
import pytest

from tests.lab.tasks.conformance import Training, check_conformance, target
from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab import tasks
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import TASKS, Task, load_task, load_tasks
from wnn_jax.lab.tasks.data import DATASETS

LEARNING_RATES = {"mnist-diffusion": 3e-3, "cifar10-16-diffusion": 3e-3}

# One of each kind of task, except diffusion. The others are other networks.
QUICK = {"digits-cnn", "mnist-autoencoder", "shakespeare-transformer"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)
def test_tasks_conform(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)
    folders = (tmp_path / str(number) for number in itertools.count())

    def make_task() -> Task:
        # Another folder each time, so that the data is loaded again.
        task: Any = load_task(name, next(folders))
        if hasattr(task, "base"):
            return dataclasses.replace(task, base=dataclasses.replace(task.base, batch_size=12))
        return dataclasses.replace(task, batch_size=12)

    check_conformance(make_task, learning_rate=LEARNING_RATES.get(name, 1e-2))


def test_a_task_is_loaded_once_and_learned(tmp_path: Path):
    task = load_task("digits-cnn", tmp_path)
    assert load_task("digits-cnn", tmp_path) is task
    state, _ = Training(task, optax.adam(1e-2)).run(100)
    assert target(task, state) > 0.9


def test_importing_tasks_reads_no_data():
    program = "import sys, wnn_jax.lab.tasks; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sklearn", "tensorflow_datasets", "tensorflow", "matplotlib", "gymnasium"} & set(modules)


def test_an_unknown_task_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"the task 'imagenet' is not known; choose from .*digits-cnn"):
        load_task("imagenet", tmp_path)


def test_all_missing_data_sets_are_listed_before_any_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert list(load_tasks(["digits-cnn"], tmp_path)) == ["digits-cnn"]
    monkeypatch.setattr(tasks, "load_task", lambda name, data_dir: pytest.fail("loads data"))
    with pytest.raises(UsageError, match="holds no 'cifar10' and no 'mnist' folder prepared by TensorFlow Datasets"):
        load_tasks(["cifar10-vanilla", "digits-cnn", "mnist-mlp", "cifar10-16-resnet"], tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_needs_the_data_that_it_names(name: str, tmp_path: Path):
    dataset = TASKS[name].dataset
    prepared = None if dataset is None else DATASETS[dataset].prepared
    with contextlib.nullcontext() if prepared is None else pytest.raises(UsageError, match=f"no '{prepared}'"):
        load_task(name, tmp_path)
