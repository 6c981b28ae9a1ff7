"""The commands of `wnn-jax`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wnn_jax.lab.comparing.comparison import Compare, compare
from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.forecasting.forecast_errors import Forecast, forecast
from wnn_jax.lab.forecasting.nowcasters import Export, export
from wnn_jax.lab.forecasting.train import Train, train

# The record is `experiments/digits.md`.
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
        description="Train a small CNN on scikit-learn's digits with and without nowcasting. It needs no download and "
        "takes a few minutes on two cores. The options are those of `compare`.",
    ),
]

_RUN: Any = {Collect: collect, Train: train, Forecast: forecast, Compare: compare, Export: export}


def run() -> None:
    """Run the command that the command line names. An option that cannot be used is a `UsageError`."""
    options: Any = tyro.cli(
        _Demo | Collect | Train | Forecast | Compare | Export,
        prog="wnn-jax",
        description="Make nowcasters and compare them: collect trajectories, train on them, measure forecast errors, "
        "compare the training steps that methods save, and export a nowcaster.",
    )
    _RUN[type(options)](options)
