"""Forecast errors of the bundled nowcasters and of linear fits, on runs that none of them saw.

    wnn-jax collect --family small --output runs/small --data-dir DIR
    wnn-jax collect --family three-conv --output runs/three-conv --data-dir DIR
    python -m experiments.forecasts

The record is `forecasts.md`.
"""

from pathlib import Path

import tyro

from wnn_jax.lab.errors import one_line_errors
from wnn_jax.lab.forecasting.forecast_errors import Forecast, forecast

CONFIG = Forecast(
    nowcasters=("pooled-linear", "wnn-plus", "wnn", "linear@0.5", "linear"),
    collection=(Path("runs/small"), Path("runs/three-conv")),
    output=Path("runs/forecasts"),
)

if __name__ == "__main__":
    options = tyro.cli(Forecast, prog="python -m experiments.forecasts", description=__doc__, default=CONFIG)
    with one_line_errors():
        forecast(options)
