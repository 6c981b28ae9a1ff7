"""Steps saved by the default nowcaster and its rivals on seven tasks: images, text, and denoising.

    python -m experiments.acceleration --data-dir DIR

Every arm is at the best of its learning rates, by one seed (10) that is not among the three reported (0, 1, 2), and is
read from the weights or their moving averages, whichever is best. AdEMAMix, schedule-free AdamW and Muon are optimizers
of their own: where the others train with SGD they have rates of Adam's size. The results have yet to be made.

| task | network | optimizer | steps |
|---|---|---|---|
| cifar10-16-three-conv | three convolutions, images of 16x16 | Adam | 6,000 |
| cifar10-three-conv | three convolutions, images of 32x32 | Adam | 3,000 |
| cifar10-16-resnet | ResNet with batch normalisation, mirrored images | SGD, Nesterov momentum | 3,000 |
| mnist-mlp | one hidden layer | Adam | 6,000 |
| mnist-autoencoder | six layers with 16 units in the middle, images of 14x14 | Adam | 6,000 |
| mnist-diffusion | U-Net that denoises | Adam | 3,000 |
| shakespeare-transformer | one-layer transformer of characters | AdamW | 6,000 |
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare
from wnn_jax.meta.evaluation.survey import Survey, main

PLAIN = ("plain", "wsd")
# Optimizers of their own.
OPTIMIZERS = ("ademamix-3", "ademamix-6", "schedule-free")
# Behind any optimizer.
WRAPPERS = ("snoo", "adaptive-linear", "slow-drift", "drift")
ARMS = (*PLAIN, *OPTIMIZERS, *WRAPPERS)
MUON = ("muon", "drift+muon")

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
LOWER = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
OWN_RATES: dict[str, tuple[float, ...]] = dict.fromkeys(("schedule-free", *MUON), HIGHER)
SEARCH_SEEDS = (10,)

COMPARISONS = (
    Compare(
        task="cifar10-16-three-conv",
        arms=(*ARMS, *MUON),
        optimizer="adam",
        learning_rates=RATES,
        own_rates={**OWN_RATES, **dict.fromkeys(PLAIN, HIGHER), **dict.fromkeys(("ademamix-6", "slow-drift"), LOWER)},
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    Compare(
        task="cifar10-three-conv",
        arms=ARMS,
        optimizer="adam",
        learning_rates=RATES,
        own_rates=OWN_RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=3_000,
        evaluate_every=100,
    ),
    Compare(
        task="cifar10-16-resnet",
        arms=ARMS,
        optimizer="sgd",
        learning_rates=(0.025, 0.05, 0.1, 0.2),
        own_rates=OWN_RATES | dict.fromkeys(OPTIMIZERS, RATES),
        search_seeds=SEARCH_SEEDS,
        num_steps=3_000,
        evaluate_every=100,
    ),
    Compare(
        task="mnist-mlp",
        arms=ARMS,
        optimizer="adam",
        learning_rates=RATES,
        own_rates=OWN_RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=25,
    ),
    Compare(
        task="mnist-autoencoder",
        arms=ARMS,
        optimizer="adam",
        learning_rates=RATES,
        own_rates={**OWN_RATES, **dict.fromkeys(("ademamix-3", "ademamix-6", "slow-drift", "drift"), LOWER)},
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    Compare(
        task="mnist-diffusion",
        arms=ARMS,
        optimizer="adam",
        learning_rates=RATES,
        own_rates=OWN_RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=3_000,
        evaluate_every=100,
    ),
    Compare(
        task="shakespeare-transformer",
        arms=(*ARMS, *MUON),
        optimizer="adamw",
        learning_rates=RATES,
        own_rates=OWN_RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
)

CONFIG = Survey(output=Path("runs/acceleration"))

if __name__ == "__main__":
    main(CONFIG, COMPARISONS, __doc__)
