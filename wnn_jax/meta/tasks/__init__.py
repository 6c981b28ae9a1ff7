"""Tasks: what is trained, to make nowcasters and to judge them.

A kind of task is one file in this folder, with a class that has the methods of `Task` and a table `TASKS` from the name
of each task to a function that makes it, given the folder of data sets. Nothing else has to know of it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from wnn_jax.meta.errors import look_up
from wnn_jax.meta.tasks.data.datasets import MissingDatasetError, available_datasets
from wnn_jax.meta.tasks.task import Metric as Metric
from wnn_jax.meta.tasks.task import Task as Task
from wnn_jax.meta.tasks.task import check_task as check_task

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


def load_tasks(names: Sequence[str], data_dir: Path) -> dict[str, Task]:
    """Several tasks by their names.

    Args:
      names: names in `TASKS`.
      data_dir: the folder of data sets prepared by TensorFlow Datasets.

    Raises:
      UsageError: as `load_task` does, but all data sets that are missing are listed at once.
    """
    tasks: dict[str, Task] = {}
    missing: list[str] = []
    for name in names:
        try:
            tasks[name] = load_task(name, data_dir)
        except MissingDatasetError as error:
            missing += error.prepared
    if missing:
        raise MissingDatasetError(missing, data_dir, _tasks_on_what_is_there(data_dir))
    return tasks


def _tasks_on_what_is_there(data_dir: Path) -> list[str]:
    """The tasks whose tables name, by `functools.partial(..., dataset=NAME)`, data that can be loaded."""
    available = available_datasets(data_dir)
    return [name for name, factory in TASKS.items() if getattr(factory, "keywords", {}).get("dataset") in available]
