"""Nowcasting and its rivals on CIFAR-10 at 16x16, with a three-conv net and Adam.

RECORD
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare, main

CONFIG = Compare(
    task="cifar10-16-three-conv",
    arms=(
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
    optimizer="adam",
    learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    search_seeds=(10,),
    num_steps=3_000,
    evaluate_every=100,
    output=Path("runs/cifar10-16-three-conv"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
