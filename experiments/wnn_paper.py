"""The first table of WNN's paper: its CNN on CIFAR-10, by its protocol.

    python -m experiments.wnn_paper --data-dir DIR

The record is `wnn_paper.md`.
"""

import dataclasses

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison
from wnn_jax.nowcasters import CURVES

FULL_SIZE = Comparison(
    task="cifar10-vanilla",
    methods=("plain", "wnn", "drift"),
    learning_rates=(1e-3,),
    seeds=(0,),
    # Fifty epochs of 45 steps.
    num_steps=50 * 45,
    evaluate_every=45,
    snapshot_every=45,
)
HALF_SIZE = dataclasses.replace(
    FULL_SIZE,
    task="cifar10-16-vanilla",
    methods=("plain", "wnn", "introspection", *CURVES, "drift"),
    recorded=("introspection",),
    num_steps=30 * 45,
)

COMPARISONS = {
    "cifar10-vanilla": FULL_SIZE,
    "cifar10-16-vanilla": HALF_SIZE,
    "cifar10-16-vanilla-three-seeds": dataclasses.replace(
        HALF_SIZE,
        methods=("plain", "wnn", "introspection", "linear", "michaelis_menten", "sigmoid", "drift"),
        seeds=(0, 1, 2),
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
