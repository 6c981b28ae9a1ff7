"""Nowcasting on scikit-learn's handwritten digits, the experiment that needs no download.

A small CNN on 897 real 8x8 images; 500 others are for validation.
"""

import dataclasses
from pathlib import Path

from experiments.harness import cli
from experiments.harness.data import load_digits
from experiments.harness.models import VanillaCNN
from experiments.harness.training import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(cli.Options):
    """Options of this experiment."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    output: Path = Path("runs/digits")


def make_task(options: Options) -> Task:
    """The data and the network of this experiment, with the options applied."""
    dataset = load_digits()
    model = VanillaCNN(num_classes=dataset.num_classes, features=(8, 16), hidden=32)
    return cli.make_task(options, dataset=dataset, model=model, augment=None)


if __name__ == "__main__":
    cli.main(Options, make_task, __doc__ or "")
