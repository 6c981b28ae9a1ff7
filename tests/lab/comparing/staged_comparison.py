"""A comparison with a method of two stages, as a program that a test can kill."""

import sys
from pathlib import Path

import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax.lab.comparing.comparison import Compare, compare
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainCoefficients

TWA = Method(
    "twa",
    lambda learning_rate, num_steps: optax.chain(
        optax.adam(learning_rate), wnn_jax.nowcast("linear", snapshot_every=7), averaging.lawa(3, 20)
    ),
    stages=(TrainCoefficients(share=0.5),),
)

if __name__ == "__main__":
    compare(
        Compare(
            task="digits-cnn",
            methods=("twa",),
            own_methods={"twa": TWA},
            learning_rates=(1e-3,),
            seeds=(3,),
            num_steps=120,
            evaluate_every=20,
            num_processes=1,
            checkpoint_seconds=0.0,
            output=Path(sys.argv[1]),
        )
    )
