"""The commands of `wnn-jax`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from wnn_jax.lab.comparing.comparison import Compare, compare
from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.forecasting.export import Export, export
from wnn_jax.lab.forecasting.forecast import Forecast, forecast
from wnn_jax.lab.forecasting.train import Train, train

# `experiments/digits.py` is its record.
DEMO = Compare(
    task="digits-cnn",
    methods=("plain", "wsd", "ademamix-3", "linear", "pooled-linear", "drift"),
    learning_rates=(1e-3, 3e-3, 1e-2),
    seeds=(0, 1, 2, 3, 4),
    num_steps=840,
    output=Path("runs/demo"),
)

_Demo = Annotated[
    Compare,
    tyro.conf.subcommand(
        "demo",
        default=DEMO,
        description="Train a small CNN with and without nowcasting on scikit-learn's digits: a comparison of six methods, "
        "without any download, in a few minutes on two cores. Its options are those of `compare`.",
    ),
]

_RUN: dict[type[Any], Callable[[Any], Any]] = {
    Collect: collect,
    Train: train,
    Forecast: forecast,
    Compare: compare,
    Export: export,
}


def run() -> None:
    """Runs the command that the command line names.

    Raises:
      UsageError: if one of its options cannot be used.
    """
    options: Any = tyro.cli(
        _Demo | Collect | Train | Forecast | Compare | Export,
        prog="wnn-jax",
        description="Make nowcasters and judge them: collect trajectories, train on them, "
        "measure the errors of forecasts, compare the training that is saved, export.",
    )
    _RUN[type(options)](options)
