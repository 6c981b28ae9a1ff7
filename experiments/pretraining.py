"""The network that `shakespeare-fine-tuning` and `shakespeare-lora` begin with, trained on half of a text.

    python -m experiments.pretraining --data-dir DIR

The transformer of `shakespeare-transformer` (37,745 parameters) on the first half of the training text of tiny
Shakespeare: Coriolanus, Richard III, Richard II and a half of Romeo and Juliet. AdamW at 3e-3, weight decay 0.01, the
rate decayed to 0 over the last fifth of 6,000 steps, batches of 32 windows of 64 characters; nothing of this was tuned.
The weights at the end come with the package, so that every fine-tuning begins with the same ones.

What is fine-tuned on is the second half: the rest of Romeo and Juliet, Henry VI, The Winter's Tale, Measure for Measure
and the first scenes of The Taming of the Shrew, whose next scenes are the validation text. The test text is the end of
that play and a part of The Tempest. 1,500 steps by the same recipe (seed 0) show what there is to learn in each half:

| trained on | steps | validation perplexity | test perplexity |
|---|---|---|---|
| first half (the weights that come with the package) | 6,000 | 7.406 | 7.522 |
| first half, then on with it | 6,000 + 1,500 | 7.490 | 7.515 |
| first half, then the second | 6,000 + 1,500 | 5.376 | 6.301 |
| second half alone | 1,500 | 6.062 | 6.669 |

What this says. The halves differ: more of the first one gains nothing, and the second one much. What was learned on
the first is of use on the second, where the same steps from random weights end far above. One seed; one core of a CPU,
Python 3.11, jax 0.10.2, optax 0.2.8.
"""

import dataclasses
from pathlib import Path

import tyro

from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.errors import check_options, one_line_errors
from wnn_jax.lab.tasks.data import load_dataset
from wnn_jax.lab.tasks.fine_tuning import PRETRAINED, save_params, shakespeare_half
from wnn_jax.lab.training.optimizers import base_optimizer
from wnn_jax.lab.training.trainer import Fitted, fit


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
    (method,) = find_methods(["wsd"], base_optimizer("adamw"))
    task = shakespeare_half("first", load_dataset("tiny_shakespeare", options.data_dir))
    fitted = fit(task, method, options.seed, learning_rate=options.learning_rate, num_steps=options.num_steps)
    save_params(fitted.state.params, options.output)
    return fitted


CONFIG = Pretrain()

if __name__ == "__main__":
    summary = (__doc__ or "").partition("\n\n")[0]
    options = tyro.cli(Pretrain, prog="python -m experiments.pretraining", description=summary, default=CONFIG)
    with one_line_errors():
        fitted = pretrain(options)
        print("validation", fitted.evaluations[-1].scores["weights"], "test", fitted.test["weights"])
