"""Comparisons of the same ways to train on several tasks, and one table over all of them."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from wnn_jax.lab.comparing.comparison import Compare, Plan, make_console, make_plan
from wnn_jax.lab.comparing.methods import METHOD_HELP
from wnn_jax.lab.comparing.plots import plot_tasks
from wnn_jax.lab.comparing.summary import Row, summarize_tasks
from wnn_jax.lab.comparing.tables import print_tasks, tasks_as_markdown
from wnn_jax.lab.errors import UsageError, check_options, look_up, one_line_errors
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.tasks import MissingDatasetError, load_tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """Compare ways to train on several tasks, one after another: how many steps each one saves, on every task.

    Called again, it goes on, as each comparison does.
    """

    tasks: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TASK [TASK ...]")] = None
    """Tasks to train. Default: all. The table is over all of them, whatever is trained now."""
    methods: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            help=f"Methods to train, of those of each task. Default: all. {METHOD_HELP}", metavar="METHOD [METHOD ...]"
        ),
    ] = None
    train: bool = True
    """Whether to make the results that are missing; otherwise only what is there is shown."""
    output: Path = Path("runs/survey")
    """Folder for the table over all tasks and its plot, with a folder for every task in it."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    resume: bool = True
    """Whether to keep finished and interrupted runs; otherwise all of them begin anew."""
    checkpoint_seconds: float = 30.0
    """At the first evaluation this long after the last checkpoint (or the start) a checkpoint is saved."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU, one on an accelerator."""
    executor: str | None = None
    """Dask scheduler to train on: an address such as tcp://HOST:8786, or a scheduler file. Default: this machine."""


def survey(options: Survey, comparisons: Sequence[Compare]) -> list[Row]:
    """Runs the comparisons of several tasks, and reports: one table over all of them, as text and as CSV, and a plot.

    Args:
      options: which of them to train, and where.
      comparisons: one for every task. Their folders, and how they train, are those of `options`.

    Returns:
      The rows of the table, one per method.

    Raises:
      UsageError: if an option cannot be used, or data is missing of a task to train; all that is missing is listed.
    """
    check_options(options, positive=("num_processes",))
    by_task = {comparison.task: _with_options(comparison, options) for comparison in comparisons}
    chosen = tuple(by_task) if options.tasks is None else options.tasks
    for name in chosen:
        look_up(by_task, name, "--tasks")
    methods = tuple(dict.fromkeys(method for comparison in comparisons for method in comparison.methods))
    for name in options.methods or ():
        if name not in methods:
            raise UsageError(f"--methods {name!r} is a method of no task here; choose from {', '.join(methods)}.")
    chosen = chosen if options.train else ()
    load_tasks(chosen, options.data_dir.absolute())

    console = make_console()
    plans: dict[str, Plan] = {}
    for name in chosen:
        console.rule(name)
        plans[name] = make_plan(by_task[name])
        plans[name].train(
            console,
            [method for method in by_task[name].methods if options.methods is None or method in options.methods],
        )
    rows: dict[str, list[Row]] = {}
    for name, comparison in by_task.items():
        plan = plans.get(name) or _plan_of_what_is_there(comparison)
        if plan is not None:
            console.rule(name)
            rows[name] = plan.report(console)
    missing = {name: _missing(comparison, rows.get(name, [])) for name, comparison in by_task.items()}
    rows = {name: task_rows for name, task_rows in rows.items() if task_rows}
    table = summarize_tasks(rows, methods)
    save_rows(
        [{"task": name, **row} for name, task_rows in rows.items() for row in task_rows], options.output / "tasks.csv"
    )
    save_rows(table, options.output / "summary.csv")
    (options.output / "table.md").write_text(tasks_as_markdown(table, rows, missing))
    if table:
        plot_tasks(table, rows, options.output / "steps-saved.png")
        print_tasks(table, rows, console)
    for name, names in missing.items():
        if names:
            console.print(f"missing: {name}: {', '.join(names)}", soft_wrap=True, style="yellow")
    console.print(f"Table and plot: {options.output}", soft_wrap=True)
    return table


def _with_options(comparison: Compare, options: Survey) -> Compare:
    return dataclasses.replace(
        comparison,
        output=options.output / comparison.task,
        data_dir=options.data_dir,
        resume=options.resume,
        checkpoint_seconds=options.checkpoint_seconds,
        num_processes=options.num_processes,
        executor=options.executor,
    )


def _plan_of_what_is_there(comparison: Compare) -> Plan | None:
    """The comparison, if there are results of it and the data that they are known by."""
    if not (comparison.output / "runs").is_dir():
        return None
    try:
        return make_plan(comparison)
    except MissingDatasetError:
        return None


def _missing(comparison: Compare, rows: Sequence[Row]) -> list[str]:
    """The methods of a comparison that are not in its table."""
    done = {row["method"] for row in rows}
    return [method for method in comparison.methods if method not in done]


def main(config: Survey, comparisons: Sequence[Compare], record: str | None) -> None:
    """The entry point of an experiment on several tasks.

    Args:
      config: the defaults of all options.
      comparisons: one for every task.
      record: the docstring, whose first paragraph describes the experiment in its help.
    """
    tasks = ", ".join(comparison.task for comparison in comparisons)
    options = tyro.cli(
        Survey,
        prog=f"python -m experiments.{Path(sys.argv[0]).stem}",
        description=f"{(record or '').partition(chr(10) * 2)[0]}\n\nTasks: {tasks}.",
        default=config,
    )
    with one_line_errors():
        survey(options, comparisons)
