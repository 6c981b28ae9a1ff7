"""The weights that the fine-tuning tasks begin with: a character transformer on the first half of its text.

    python -m experiments.pretraining --data-dir DIR

The record is `pretraining.md`.
"""

import dataclasses
from pathlib import Path

import tyro

from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.errors import check_options, one_line_errors
from wnn_jax.lab.tasks.fine_tuning import PRETRAINED, save_params, shakespeare_half
from wnn_jax.lab.training.optimizers import adamw
from wnn_jax.lab.training.trainer import Fitted, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train the transformer of `shakespeare-transformer` on the first half of its training text, by AdamW and WSD."""

    learning_rate: float = 3e-3
    """Of AdamW; it decays to 0 over the last fifth of the steps."""
    num_steps: int = 6_000
    """Length of the training in optimizer steps."""
    seed: int = 0
    """Of the initial weights and of the batches."""
    output: Path = PRETRAINED
    """Where the weights are written."""
    data_dir: Path = Path.home() / "tensorflow_datasets"
    """Folder of data sets prepared by TensorFlow Datasets."""


def pretrain(options: Pretrain) -> Fitted:
    """Trains the network, and writes its weights.

    Raises:
      UsageError: if an option cannot be used, or the data is missing.
    """
    check_options(options, positive=("learning_rate", "num_steps"))
    (method,) = find_methods(["wsd"], adamw)
    task = shakespeare_half("first", options.data_dir)
    trainer = Trainer(task, method, learning_rate=options.learning_rate, num_steps=options.num_steps)
    fitted = trainer.fit(options.seed)
    save_params(fitted.state.params, options.output)
    return fitted


if __name__ == "__main__":
    options = tyro.cli(Pretrain, prog="python -m experiments.pretraining", description=__doc__)
    with one_line_errors():
        fitted = pretrain(options)
        print("validation", fitted.evaluations[-1].scores["weights"], "test", fitted.test["weights"])
