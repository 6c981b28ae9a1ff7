"""Nowcasters that see neurons, on a small CNN on CIFAR-10 at 16x16, with Adam: NiNo, and pooled histories.

    python -m experiments.neuron_interaction --data-dir DIR
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare, main

CONFIG = Compare(
    task="cifar10-16-three-conv",
    arms=("plain", "drift", "wnn-plus~40-1", "adaptive-linear"),
    learning_rates=(3e-3, 6e-3),
    seeds=(0, 1, 2),
    num_steps=3_000,
    evaluate_every=100,
    # A fiftieth of the training, as in NiNo's paper.
    snapshot_every=60,
    metric="loss",
    output=Path("runs/neuron-interaction"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
