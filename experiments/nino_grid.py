"""The vision grid of NiNo's paper: CIFAR-10 with three convolutions, 10,000 steps.

    python -m experiments.nino_grid --data-dir DIR

The record is `nino_grid.md`. The published networks cannot be shipped: convert them with `wnn_jax.convert`, and name
their files in `wnn-jax compare --methods`. Other tasks of the grid (`fashion-mnist-three-conv`,
`cifar100-three-conv-32`) need data that was not available.
"""

import dataclasses

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

PUBLISHED = ("wnn-plus-published~40-1", "nino-published~40-1")

C10_16 = Comparison(
    task="cifar10-three-conv",
    methods=("plain", "drift", *PUBLISHED),
    recorded=PUBLISHED,
    learning_rates=(3e-3,),
    seeds=(0, 1),
    num_steps=10_000,
    evaluate_every=200,
    snapshot_every=200,
    target=0.66,
    evaluation_weights="weights",
)

COMPARISONS = {
    "cifar10-three-conv": C10_16,
    "cifar10-three-conv-32": dataclasses.replace(
        C10_16,
        task="cifar10-three-conv-32",
        methods=("plain", *PUBLISHED, "drift"),
        # No method reaches the paper's 72.5 % with its weights.
        target=None,
        evaluation_weights=None,
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
