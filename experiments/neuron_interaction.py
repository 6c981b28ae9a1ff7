"""NiNo, WNN+ and pooled linear extrapolation on a small CNN and a character transformer.

    python -m experiments.neuron_interaction --data-dir DIR

The record is `neuron_interaction.md`. It says which files the recorded methods were. The published ones cannot be
shipped: convert them with `wnn_jax.convert`, and name their files in `wnn-jax compare --methods`.
"""

import dataclasses

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

# A snapshot every fiftieth of a run.
CNN = Comparison(
    task="cifar10-16-three-conv",
    methods=("plain", "drift", "wnn-plus-published~40-1", "nino-published~40-1", "pooled"),
    recorded=("wnn-plus-published~40-1", "nino-published~40-1", "pooled"),
    learning_rates=(3e-3, 6e-3, 1.2e-2),
    num_steps=3_000,
    evaluate_every=100,
    snapshot_every=60,
    metric="loss",
)
TRANSFORMER = dataclasses.replace(
    CNN,
    task="shakespeare-transformer",
    methods=("plain", "drift", "nino-published~40-1", "wnn-plus-published~40-1"),
    recorded=("nino-published~40-1", "wnn-plus-published~40-1"),
    optimizer="adamw",
    learning_rates=(3e-3, 6e-3),
)
OURS = ("wnn-plus~40-1", "adaptive-linear", "nino5~40-1")
# Of snapshots, and of running means (`+ema`).
AVERAGES = (
    "nino~20",
    "nino~20+ema",
    "adaptive-linear~20",
    "adaptive-linear~20+ema",
    "adaptive-linear-average~20+ema",
    "pooled2~20",
    "pooled2~20+ema",
)

COMPARISONS = {
    "three-conv": CNN,
    "three-conv-trained-by-us": dataclasses.replace(
        CNN,
        methods=("plain", *OURS, "nino4~40-1"),
        recorded=("adaptive-linear", "nino5~40-1", "nino4~40-1"),
        learning_rates=(6e-3,),
        seeds=tuple(range(6)),
    ),
    "three-conv-averages": dataclasses.replace(
        CNN, methods=("plain", *AVERAGES), recorded=AVERAGES, learning_rates=(6e-3,), seeds=tuple(range(6))
    ),
    "transformer": TRANSFORMER,
    "transformer-trained-by-us": dataclasses.replace(
        TRANSFORMER, methods=("plain", *OURS), recorded=("adaptive-linear", "nino5~40-1"), optimizer="adam"
    ),
    "transformer-averages": dataclasses.replace(
        TRANSFORMER, methods=("plain", *AVERAGES), recorded=AVERAGES, optimizer="adam", learning_rates=(6e-3,)
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
