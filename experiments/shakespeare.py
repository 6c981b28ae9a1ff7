"""Nowcasting and its rivals on a language model: characters of tiny Shakespeare, a one-layer transformer, AdamW.

RECORD
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare, main

CONFIG = Compare(
    task="shakespeare-transformer",
    arms=(
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
    optimizer="adamw",
    learning_rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
    search_seeds=(10,),
    num_steps=3_000,
    evaluate_every=100,
    output=Path("runs/shakespeare"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
