"""Nowcasting and other methods on scikit-learn's digits: the experiment that needs no download.

    python -m experiments.digits

The record is `digits.md`. `wnn-jax demo` runs the methods that this version can train.
"""

import dataclasses

from wnn_jax.lab.commands import DEMO
from wnn_jax.lab.comparing.comparison import main

COMPARISONS = {
    "digits-cnn": dataclasses.replace(
        DEMO,
        methods=("plain", "wsd", "ademamix-3", "linear", "adaptive-linear", "drift"),
        recorded=("adaptive-linear",),
    )
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
