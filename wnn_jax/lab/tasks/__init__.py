"""Tasks: what is trained, to make nowcasters and to judge them.

A kind of task is one file in this folder, with a class that has the methods of `Task` and a table `TASKS` from the name
of each task to a function that makes it, given the folder of data sets. A function that loads one of `DATASETS` names
it, as `functools.partial(..., dataset=NAME)`. Nothing else has to know of it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from wnn_jax.lab.errors import look_up
from wnn_jax.lab.tasks.data.datasets import MissingDatasetError, available_datasets, check_datasets
from wnn_jax.lab.tasks.task import Metric as Metric
from wnn_jax.lab.tasks.task import Task as Task
from wnn_jax.lab.tasks.task import check_task as check_task

TaskFactory = Callable[[Path], Task]


def find_tasks(folders: Iterable[str]) -> dict[str, TaskFactory]:
    """Collects the tables `TASKS` of all modules of this package.

    Args:
      folders: where the modules of the package are.

    Returns:
      From the name of a task to what makes it, in the order of the modules' names.

    Raises:
      ValueError: if two modules have a task of the same name.
    """
    tasks: dict[str, TaskFactory] = {}
    modules: dict[str, str] = {}
    for module in pkgutil.iter_modules(folders):
        if module.ispkg:
            continue
        table: Mapping[str, TaskFactory] = getattr(importlib.import_module(f"{__name__}.{module.name}"), "TASKS", {})
        for name, factory in table.items():
            if name in tasks:
                raise ValueError(f"TASKS of {modules[name]} and {module.name} both have {name!r}; rename one of them.")
            tasks[name], modules[name] = factory, module.name
    return tasks


TASKS: Mapping[str, TaskFactory] = find_tasks(__path__)


@functools.cache
def load_task(name: str, data_dir: Path) -> Task:
    """A task by its name, made once per process.

    Args:
      name: a name in `TASKS`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.

    Raises:
      UsageError: if the name is not known, the data is missing, or the task's metrics cannot be compared.
    """
    factory = look_up(TASKS, name, "the task")
    try:
        task = factory(data_dir)
    except MissingDatasetError as error:
        raise MissingDatasetError(error.prepared, data_dir, _tasks_on_what_is_there(data_dir)) from None
    check_task(task)
    return task


def check_data(datasets: Iterable[str], data_dir: Path) -> None:
    """Makes sure that data sets can be loaded, as `check_datasets` does, or says which tasks can be trained instead.

    Args:
      datasets: names in `DATASETS`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.

    Raises:
      UsageError: if a name is not known, or data is missing; all data sets that are missing are listed at once.
    """
    try:
        check_datasets(datasets, data_dir)
    except MissingDatasetError as error:
        raise MissingDatasetError(error.prepared, data_dir, _tasks_on_what_is_there(data_dir)) from None


def load_tasks(names: Sequence[str], data_dir: Path) -> dict[str, Task]:
    """Several tasks by their names.

    Args:
      names: names in `TASKS`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.

    Raises:
      UsageError: as `load_task` does, but all data sets that are missing are listed at once, before any is loaded.
    """
    datasets = [_dataset(look_up(TASKS, name, "the task")) for name in names]
    check_data(filter(None, datasets), data_dir)
    return {name: load_task(name, data_dir) for name in names}


def _dataset(factory: TaskFactory) -> str | None:
    """The data set that a task is trained on, or `None` if it needs none."""
    return getattr(factory, "keywords", {}).get("dataset")


def _tasks_on_what_is_there(data_dir: Path) -> list[str]:
    """The tasks that can be trained."""
    available = [None, *available_datasets(data_dir)]
    return [name for name, factory in TASKS.items() if _dataset(factory) in available]
