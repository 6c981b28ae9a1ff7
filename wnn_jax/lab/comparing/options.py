"""The options of comparisons: what is compared, and how it runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from wnn_jax.lab.comparing.methods import METHOD_HELP
from wnn_jax.lab.errors import UsageError, check_options
from wnn_jax.lab.tasks import TASKS, Task
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS, BaseOptimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare: methods on one task, each at its own best learning rate."""

    task: Annotated[str, tyro.conf.arg(help=f"What to train: {', '.join(TASKS)}.", metavar="TASK")]
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=METHOD_HELP, metavar="METHOD [METHOD ...]")] = (
        "plain",
        "wsd",
        "ademamix-3",
        "drift",
    )
    optimizer: Annotated[str, tyro.conf.arg(help=f"The optimizer of the methods: {', '.join(BASE_OPTIMIZERS)}.")] = (
        "adam"
    )
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    """Every method trains at each learning rate. Its best one is chosen on the validation split."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per method and seed. A seed decides the initial weights and the data order, alike for all methods."""
    search_seeds: tuple[int, ...] | None = None
    """Seeds that choose the learning rates; `seeds` then run at the best one alone. Default: `seeds`."""
    num_steps: int = 3_000
    """Length of a run in optimizer steps."""
    evaluate_every: int | None = None
    """Steps between evaluations. Default: 40 evaluations in all."""
    snapshot_every: int | None = None
    """Steps between snapshots, for nowcasters with a window. Default: 30 snapshots in all."""
    metric: str | None = None
    """What counts. Default: the first metric of the task."""
    target: float | None = None
    """Value of the metric to reach. Default: for every seed, the best value of the best baseline."""
    evaluation_weights: str | None = None
    """What to evaluate in every method, such as `weights`. Default: the best of weights, averages and its own."""
    own_rates: Annotated[Mapping[str, tuple[float, ...]], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Other learning rates for single methods."""
    recorded: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Methods that this version can no longer train. Tables show their recorded runs."""
    make_task: Annotated[Callable[[Path], Task] | None, tyro.conf.Suppress] = None
    """Makes the task from the data folder. `task` is then only its name in results."""
    base: Annotated[BaseOptimizer | None, tyro.conf.Suppress] = None
    """Makes the optimizer of the methods, in place of `optimizer`."""
    own_methods: Annotated[Mapping[str, Method], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Further methods by name."""

    def learning_rates_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates of a method."""
        return self.own_rates.get(method, self.learning_rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How comparisons run, and where."""

    output: Path = Path("runs/comparison")
    """Folder for tables, plots and results."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""
    train: bool = True
    """Whether to make the runs that are missing. Otherwise the tables and plots show what is there."""
    checkpoint_seconds: float = 30.0
    """The first evaluation this long after the last checkpoint (or the start) saves a checkpoint."""
    num_processes: int | None = None
    """Processes that train side by side. Default: one per core on CPU, one on an accelerator."""
    executor: str | None = None
    """Dask scheduler to train on: an address such as tcp://HOST:8786, or a scheduler file. Default: this machine."""


def check_comparison(comparison: Comparison) -> None:
    """Refuse values that no comparison can have by a `UsageError`."""
    check_options(comparison, positive=("num_steps", "evaluate_every", "snapshot_every"))
    for rates in (comparison.learning_rates, *comparison.own_rates.values()):
        if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UsageError(
                f"--learning-rates {_join(rates)} must be at least one learning rate, all of them distinct, finite and "
                "positive."
            )
    for name, seeds in (("seeds", comparison.seeds), ("search-seeds", comparison.search_seeds)):
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise UsageError(f"--{name} {_join(seeds)} must be at least one, distinct and not negative.")
    if comparison.target is not None and not math.isfinite(comparison.target):
        raise UsageError(f"--target {comparison.target} must be a finite value of the metric.")
    for name in ("evaluate_every", "snapshot_every"):
        every = getattr(comparison, name)
        if every is not None and every > comparison.num_steps:
            raise UsageError(f"--{name.replace('_', '-')} {every} must not exceed --num-steps {comparison.num_steps}.")


def check_execution(execution: Execution) -> None:
    """Refuse values that no execution can have by a `UsageError`."""
    check_options(execution, positive=("num_processes",))
    if execution.checkpoint_seconds < 0:
        raise UsageError(f"--checkpoint-seconds {execution.checkpoint_seconds} must not be negative.")
    if execution.output.exists() and not execution.output.is_dir():
        raise UsageError(f"--output {execution.output} is a file; name a folder.")


def _join(values: Any) -> str:
    return " ".join(f"{value:g}" for value in values) or "(none)"
