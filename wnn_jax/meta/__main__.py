"""The command line: `python -m wnn_jax.meta {collect,train,evaluate,export}`."""

import sys

import tyro

from wnn_jax.meta.collect import Collect, collect
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.evaluate import Evaluate, evaluate
from wnn_jax.meta.export import Export, export
from wnn_jax.meta.train import Train, train


def main() -> None:
    """Runs one of the four stages."""
    options = tyro.extras.subcommand_cli_from_dict(
        {"collect": Collect, "train": Train, "evaluate": Evaluate, "export": Export},
        prog="python -m wnn_jax.meta",
        description="Make nowcasters: collect trajectories, train on them, evaluate, export.",
    )
    try:
        match options:
            case Collect():
                collect(options)
            case Train():
                train(options)
            case Evaluate():
                evaluate(options)
            case Export():
                export(options)
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
