"""Comparisons: every method with every seed, at its own best learning rate, on one task or several."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from wnn_jax.lab.comparing.options import Comparison, Execution, check_execution
from wnn_jax.lab.comparing.plan import make_plan
from wnn_jax.lab.comparing.plots import plot_tasks
from wnn_jax.lab.comparing.summary import Row, summarize_tasks
from wnn_jax.lab.comparing.tables import print_tasks
from wnn_jax.lab.errors import look_up, one_line_errors
from wnn_jax.lab.output import save_rows
from wnn_jax.lab.tasks import load_tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Execution, Comparison):
    """Compare methods of training: how many steps each one saves, at its own best learning rate.

    Run the same command again to go on: finished runs are kept, interrupted runs continue from their last checkpoint.
    A result is only shown for the configuration that made it. Several processes can work on one folder.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunExperiment(Execution):
    """Run the comparisons of an experiment. Run the same command again to go on."""

    comparisons: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")] = None
    """Comparisons to train. Default: all. Tables and plots show all that is there."""
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD [METHOD ...]")] = None
    """Methods to train. Default: all."""


def compare(options: Compare) -> list[Row]:
    """Run a comparison, write its table and plot, and return the rows of the table, one per method.

    An option that cannot be used is a `UsageError`.
    """
    return run_comparisons({"comparison": options}, options)["comparison"]


def run_comparisons(
    comparisons: Mapping[str, Comparison],
    execution: Execution,
    *,
    names: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    benchmark: Sequence[str] = (),
) -> dict[str, list[Row]]:
    """Run comparisons, write their tables and plots, and return the rows of each table.

    Only the comparisons in `names` and the methods in `methods` are trained, by default all. A table has no rows while
    a baseline is unfinished. The comparisons in `benchmark` make one more table, over several tasks. An option that
    cannot be used is a `UsageError`, and so is missing data: the error lists all of it.
    """
    check_execution(execution)
    known = dict.fromkeys(name for comparison in comparisons.values() for name in comparison.methods)
    for name in names or ():
        look_up(comparisons, name, "--comparisons")
    for method in methods or ():
        look_up(known, method, "--methods")
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = () if not execution.train else tuple(comparisons) if names is None else names
    tasks = [comparisons[name].task for name in chosen if comparisons[name].make_task is None]
    load_tasks(tasks, execution.data_dir.absolute())
    plans = {
        name: make_plan(name, comparison, execution, loads_task=name in chosen)
        for name, comparison in comparisons.items()
    }
    for name in chosen:
        plans[name].train(console, methods)
    rows = {name: plan.report(console) for name, plan in plans.items()}
    summary = [{"comparison": name, **row} for name, table in rows.items() for row in table]
    save_rows(summary, execution.output / "summary.csv")
    by_task = {comparisons[name].task: rows[name] for name in benchmark if rows[name]}
    if by_task:
        table = summarize_tasks(by_task, tuple(known))
        save_rows(table, execution.output / "benchmark.csv")
        plot_tasks(table, by_task, execution.output / "benchmark.png")
        print_tasks(table, by_task, console)
    console.print(f"Results, tables and plots: {execution.output}", soft_wrap=True)
    return rows


def main(comparisons: Mapping[str, Comparison], description: str | None, *, benchmark: Sequence[str] = ()) -> None:
    """Run the command line of an experiment.

    Args:
      comparisons: by name.
      description: the docstring of the experiment, for its help.
      benchmark: the comparisons of a table over several tasks.
    """
    name = Path(sys.argv[0]).stem
    options = tyro.cli(
        RunExperiment,
        prog=f"python -m experiments.{name}",
        description=f"{description}\n\nComparisons: {', '.join(comparisons)}.",
        default=RunExperiment(output=Path("runs") / name),
    )
    with one_line_errors():
        run_comparisons(comparisons, options, names=options.comparisons, methods=options.methods, benchmark=benchmark)
