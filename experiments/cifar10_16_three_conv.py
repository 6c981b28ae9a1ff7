"""Twelve methods on a small CNN and CIFAR-10 at 16x16, each at its own best learning rate.

    python -m experiments.cifar10_16_three_conv --data-dir DIR

The record is `cifar10_16_three_conv.md`.
"""

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

COMPARISONS = {
    "cifar10-16-three-conv": Comparison(
        task="cifar10-16-three-conv",
        methods=(
            "plain",
            "cosine",
            "wsd",
            "ademamix-3",
            "ademamix-6",
            "snoo",
            "lookahead",
            "schedule-free",
            "lawa",
            "adaptive-linear",
            "wnn-plus~40-1",
            "linear@0.5",
        ),
        recorded=("adaptive-linear",),
        learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
        search_seeds=(10,),
        num_steps=3_000,
        evaluate_every=100,
    )
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
