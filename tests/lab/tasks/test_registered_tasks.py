import contextlib
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from tests.lab.tasks.conformance import Training, check_conformance, target
from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab import tasks
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import TASKS, Metric, Task, check_data, find_tasks, load_task, load_tasks
from wnn_jax.lab.tasks.data import DATASETS, MissingDatasetError

LEARNING_RATES = {"mnist-diffusion": 3e-3, "cifar10-16-diffusion": 3e-3}


@pytest.fixture(autouse=True)
def _synthetic_data(monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)


# One of each kind of task, but for the diffusion; the others are of other networks.
QUICK = {"digits-cnn", "cifar10-16-three-conv", "mnist-mlp", "mnist-autoencoder", "shakespeare-transformer"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)
def test_tasks_conform(name: str, tmp_path: Path):
    folders = (tmp_path / str(number) for number in itertools.count())

    def make_task() -> Task:
        # Another folder each time, so that the data is loaded again.
        task: Any = TASKS[name](next(folders))
        if hasattr(task, "base"):
            return dataclasses.replace(task, base=dataclasses.replace(task.base, batch_size=12))
        return dataclasses.replace(task, batch_size=12)

    check_conformance(make_task, learning_rate=LEARNING_RATES.get(name, 1e-2))


def test_names_are_known():
    assert set(TASKS) >= {
        "cifar10-16-three-conv",
        "cifar10-three-conv",
        "cifar10-vanilla",
        "cifar10-16-resnet",
        "mnist-mlp",
        "digits-cnn",
        "shakespeare-transformer",
        "mnist-diffusion",
    }


def test_a_task_is_loaded_once_and_learned(tmp_path: Path):
    task = load_task("digits-cnn", tmp_path)
    assert load_task("digits-cnn", tmp_path) is task
    state, _ = Training(task, optax.adam(1e-2)).run(100)
    assert target(task, state) > 0.9


def test_importing_tasks_reads_no_data():
    program = "import sys, wnn_jax.lab.tasks; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sklearn", "tensorflow_datasets", "tensorflow", "matplotlib"} & set(modules)


def test_an_unknown_task_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"the task 'imagenet' is not known; choose from .*digits-cnn"):
        load_task("imagenet", tmp_path)


def test_all_missing_data_sets_are_listed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    with pytest.raises(UsageError, match="holds no 'cifar10' and no 'mnist' folder prepared by TensorFlow Datasets"):
        load_tasks(["cifar10-vanilla", "digits-cnn", "mnist-mlp", "cifar10-16-resnet"], tmp_path)
    assert list(load_tasks(["digits-cnn"], tmp_path)) == ["digits-cnn"]
    with pytest.raises(UsageError, match=r"sets that are there: digits\. Tasks .* now: pendulum-ddpg, digits-cnn\.$"):
        load_task("coco-pose-unet", tmp_path)


def test_missing_data_is_noticed_before_any_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "load_task", lambda name, data_dir: pytest.fail("loads data"))
    with pytest.raises(UsageError, match="holds no 'mnist' folder"):
        load_tasks(["digits-cnn", "mnist-mlp"], tmp_path)


def test_all_tasks_that_can_be_trained_are_named_where_data_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    (tmp_path / "tiny_shakespeare" / "1.0.0").mkdir(parents=True)
    (tmp_path / "tiny_shakespeare" / "1.0.0" / "dataset_info.json").touch()
    names = (
        "pendulum-ddpg, shakespeare-fine-tuning, shakespeare-lora, digits-cnn, shakespeare-transformer, shakespeare-"
    )
    for check in (lambda: load_tasks(["mnist-mlp"], tmp_path), lambda: check_data(["mnist"], tmp_path)):
        with pytest.raises(MissingDatasetError, match=rf"Tasks that can be trained now: {names}lstm\.$"):
            check()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_needs_the_data_that_it_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    dataset = getattr(TASKS[name], "keywords", {}).get("dataset")
    prepared = None if dataset is None else DATASETS[dataset].prepared
    with contextlib.nullcontext() if prepared is None else pytest.raises(MissingDatasetError, match=f"no '{prepared}'"):
        TASKS[name](tmp_path)


MODULE = """
from tests.lab.tasks.test_new_task import LinearRegression

TASKS = {"NAME": lambda data_dir: LinearRegression()}
"""


def test_a_new_kind_of_task_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "linear_regression_in_a_file.py").write_text(MODULE.replace("NAME", "linear-regression"))
    folders = [*tasks.__path__, str(tmp_path)]
    monkeypatch.setattr(tasks, "__path__", folders)
    tables = find_tasks(folders)
    assert set(tables) == {*TASKS, "linear-regression"}
    assert np.shape(tables["linear-regression"](tmp_path).batch(0, 0)["y"]) == (8,)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "digits_again.py").write_text(MODULE.replace("NAME", "digits-cnn"))
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"both have 'digits-cnn'; rename one"):
        find_tasks(tasks.__path__)


def test_a_task_whose_metrics_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.lab.tasks.test_new_task import LinearRegression

    class Undirected(LinearRegression):
        metrics = (Metric("error", higher_is_better=None),)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tasks, "TASKS", {"undirected": lambda data_dir: Undirected()})
    with pytest.raises(UsageError, match="'error' has higher_is_better=None; say True or False"):
        load_task("undirected", tmp_path)
