"""Nowcasting on CIFAR-10.

By default the experiment of Jang et al. (ICML 2023, section 4.1): their vanilla CNN, batches of 1024, Adam at 1e-3,
50 epochs with rotations, shifts and zooms.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.harness import cli
from experiments.harness.augment import random_affine
from experiments.harness.data import load_cifar10
from experiments.harness.models import ThreeConv, VanillaCNN
from experiments.harness.training import Task

_MODELS = {"vanilla": VanillaCNN, "three-conv": ThreeConv}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(cli.Options):
    """Options of this experiment."""

    num_epochs: int = 50
    batch_size: int = 1024
    learning_rate: float = 1e-3
    output: Path = Path("runs/cifar10")
    model: Literal["vanilla", "three-conv"] = "vanilla"
    """The vanilla CNN of the WNN paper, or the three-conv net of the NiNo paper."""
    augment: bool = True
    """Whether to rotate, shift and zoom the training images at random."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""


def make_task(options: Options) -> Task:
    """The data and the network of this experiment, with the options applied."""
    dataset = load_cifar10(options.data_dir)
    return cli.make_task(
        options,
        dataset=dataset,
        model=_MODELS[options.model](num_classes=dataset.num_classes),
        augment=random_affine if options.augment else None,
    )


if __name__ == "__main__":
    cli.main(Options, make_task, __doc__)
