"""The command line: `python -m wnn_jax.meta {collect,train,evolve,forecast,compare,export}`."""

from collections.abc import Callable
from typing import Any

import tyro

from wnn_jax.meta.errors import one_line_errors
from wnn_jax.meta.evaluation.comparison import Compare, compare
from wnn_jax.meta.evaluation.forecast import Forecast, forecast
from wnn_jax.meta.learning.evolve import Evolve, evolve
from wnn_jax.meta.learning.export import Export, export
from wnn_jax.meta.learning.train import Train, train
from wnn_jax.meta.trajectories.collect import Collect, collect

_STAGES: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "collect": (Collect, collect),
    "train": (Train, train),
    "evolve": (Evolve, evolve),
    "forecast": (Forecast, forecast),
    "compare": (Compare, compare),
    "export": (Export, export),
}


def main() -> None:
    """Runs one of the stages."""
    options = tyro.extras.subcommand_cli_from_dict(
        {name: options_type for name, (options_type, _) in _STAGES.items()},
        prog="python -m wnn_jax.meta",
        description="Make nowcasters and judge them: collect trajectories, train on them, or through whole "
        "trainings, measure the errors of forecasts, compare the training that is saved, export.",
    )
    stages = dict(_STAGES.values())
    with one_line_errors():
        stages[type(options)](options)


if __name__ == "__main__":
    main()
