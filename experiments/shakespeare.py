"""Nine methods on a character transformer and tiny Shakespeare, each at its own best learning rate.

    python -m experiments.shakespeare --data-dir DIR

The record is `shakespeare.md`.
"""

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

COMPARISONS = {
    "shakespeare-transformer": Comparison(
        task="shakespeare-transformer",
        methods=(
            "plain",
            "cosine",
            "wsd",
            "ademamix-3",
            "ademamix-6",
            "snoo",
            "schedule-free",
            "adaptive-linear",
            "wnn-plus~40-1",
        ),
        recorded=("adaptive-linear",),
        optimizer="adamw",
        learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
        search_seeds=(10,),
        num_steps=3_000,
        evaluate_every=100,
    )
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
