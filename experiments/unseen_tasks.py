"""Tasks of the papers beyond CIFAR-10: segmentation, diffusion, a language model, fine-tuning, ImageNet and poses.

    python -m experiments.unseen_tasks --data-dir DIR

Jang et al. (ICML 2023) report how much faster networks of kinds that WNN never saw reach a fixed score with it; Knyazev
et al. (ICLR 2025) do so for language models. Here every arm is at the best of its learning rates, by one seed (10) that
is not among the three reported (0, 1, 2), and is read from the weights or their moving averages, whichever is best; the
drift is `wnn_jax.nowcast()` as it is. Reinforcement learning has a record of its own, `experiments/pendulum.py`, and so
has the paper's CNN, `experiments/wnn_paper.py`; diffusion on MNIST is in `experiments/acceleration.py`, with its samples
in `experiments/diffusion.py`. CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8. The results are in
`results/unseen-tasks/`.

| task | network | optimizer | steps | WNN's paper |
|---|---|---|---|---|
| mnist-segmentation | U-Net, synthetic scenes of digits on a textured ground, 20x20, mean IoU | Adam | 1,200 | x1.20 |
| cifar10-16-diffusion | U-Net that denoises CIFAR-10 at 16x16 | Adam | 1,200 | x1.23 |
| shakespeare-transformer | one-layer transformer of characters, perplexity | AdamW | 10,000 | x1.15 |
| shakespeare-fine-tuning | the same, pre-trained on the other half of the text | AdamW | 1,500 | x1.21 (PVTv2) |
| shakespeare-lora | the same, factors of rank 4 of its dense kernels | AdamW | 1,000 | |
| imagenet-64-resnet | ResNet, ImageNet at 64x64 | Adam | 50,000 | x1.24 |
| coco-pose-unet | U-Net that draws heatmaps of people's joints | Adam | 20,000 | x1.43 |

% of steps saved to the best score of `plain` with the same seed, with 95 % intervals:

@TABLE@

Final scores, and those on the test split:

@SCORES@

@SAYS@
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare
from wnn_jax.meta.evaluation.survey import Survey, main

ARMS = ("plain", "ademamix-6", "drift")

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
        arms=ARMS,
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
