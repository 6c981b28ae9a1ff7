"""The tasks of WNN's and NiNo's papers beyond classification on CIFAR-10, each with its own kind of network.

    python -m experiments.unseen_tasks --data-dir DIR

TABLES
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare
from wnn_jax.meta.evaluation.survey import Survey, main

PLAIN = ("plain", "wsd")
ARMS = (*PLAIN, "ademamix-6", "drift", "wnn")

LOWEST = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3)
LOWER = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEEDS = (10,)

COMPARISONS = (
    Compare(
        task="mnist-segmentation",
        arms=ARMS,
        optimizer="adam",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=60,
    ),
    Compare(
        task="cifar10-16-diffusion",
        arms=ARMS,
        optimizer="adam",
        learning_rates=HIGHER,
        own_rates={"ademamix-6": RATES},
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=120,
    ),
    # The rates are the best two of four of each arm after 6,000 steps, in `experiments/acceleration.py`.
    Compare(
        task="shakespeare-transformer",
        arms=("plain", "ademamix-6", "drift"),
        optimizer="adamw",
        learning_rates=(3e-3, 6e-3),
        own_rates={"ademamix-6": (1.5e-3, 3e-3)},
        search_seeds=SEARCH_SEEDS,
        num_steps=10_000,
        evaluate_every=200,
    ),
    Compare(
        task="shakespeare-fine-tuning",
        arms=ARMS,
        optimizer="adamw",
        learning_rates=RATES,
        own_rates=dict.fromkeys(("ademamix-6", "drift"), LOWEST),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=50,
    ),
    Compare(
        task="shakespeare-lora",
        arms=ARMS,
        optimizer="adamw",
        learning_rates=HIGHER,
        own_rates=dict.fromkeys(("ademamix-6", "drift"), RATES),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_000,
        evaluate_every=50,
    ),
    Compare(
        task="imagenet-64-resnet",
        arms=ARMS,
        optimizer="adam",
        learning_rates=LOWER,
        search_seeds=SEARCH_SEEDS,
        num_steps=50_000,
        evaluate_every=1_000,
        snapshot_every=1_000,
    ),
    Compare(
        task="coco-pose-unet",
        arms=ARMS,
        optimizer="adam",
        learning_rates=LOWER,
        search_seeds=SEARCH_SEEDS,
        num_steps=20_000,
        evaluate_every=500,
        snapshot_every=400,
    ),
)

CONFIG = Survey(output=Path("runs/unseen-tasks"))

if __name__ == "__main__":
    main(CONFIG, COMPARISONS, __doc__)
