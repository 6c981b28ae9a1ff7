"""Steps saved on five tasks by the default nowcaster and by AdEMAMix, each at its own best learning rate.

    python -m experiments.acceleration --data-dir DIR

The record is `acceleration.md`.
"""

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

BASELINES = ("plain", "wsd")
METHODS = (*BASELINES, "ademamix-3", "ademamix-6", "drift")

LOWER = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEEDS = (10,)

COMPARISONS = {
    "cifar10-16-three-conv": Comparison(
        task="cifar10-16-three-conv",
        methods=(*METHODS, "slow-drift"),
        learning_rates=RATES,
        own_rates={**dict.fromkeys(BASELINES, HIGHER), "ademamix-6": LOWER},
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    "mnist-mlp": Comparison(
        task="mnist-mlp",
        methods=(*METHODS, "slow-drift"),
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=25,
    ),
    "mnist-autoencoder": Comparison(
        task="mnist-autoencoder",
        methods=METHODS,
        learning_rates=RATES,
        own_rates=dict.fromkeys(("ademamix-3", "ademamix-6", "drift"), LOWER),
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    "mnist-diffusion": Comparison(
        task="mnist-diffusion",
        methods=(*BASELINES, "ademamix-6", "drift"),
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=3_000,
        evaluate_every=100,
    ),
    "shakespeare-transformer": Comparison(
        task="shakespeare-transformer",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__, benchmark=tuple(COMPARISONS))
