"""Five tasks that no bundled nowcaster was trained on: segmentation, diffusion, a language model, fine-tuning, LoRA.

    python -m experiments.unseen_tasks --data-dir DIR

The record is `unseen_tasks.md`. The comparisons `TASK-wnn-protocol` follow the protocol of WNN's paper.
"""

import dataclasses

from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison

METHODS = ("plain", "wsd", "ademamix-6", "drift", "drift+wsd")
SLOWER = ("ademamix-6", "drift", "drift+wsd")
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEEDS = (10,)

TUNED = {
    "mnist-segmentation": Comparison(
        task="mnist-segmentation",
        methods=METHODS,
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=60,
    ),
    "cifar10-16-diffusion": Comparison(
        task="cifar10-16-diffusion",
        methods=METHODS,
        learning_rates=HIGHER,
        own_rates={"ademamix-6": RATES},
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=120,
    ),
    # The best two of four learning rates after 6,000 steps, from `acceleration.py`.
    "shakespeare-transformer": Comparison(
        task="shakespeare-transformer",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=(3e-3, 6e-3),
        own_rates={"wsd": (3e-3, 6e-3, 1.2e-2), "ademamix-6": (1.5e-3, 3e-3)},
        search_seeds=SEARCH_SEEDS,
        num_steps=10_000,
        evaluate_every=200,
    ),
    "shakespeare-fine-tuning": Comparison(
        task="shakespeare-fine-tuning",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=RATES,
        own_rates=dict.fromkeys(SLOWER, (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=50,
    ),
    "shakespeare-lora": Comparison(
        task="shakespeare-lora",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=HIGHER,
        own_rates=dict.fromkeys(SLOWER, (7.5e-4, *RATES)),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_000,
        evaluate_every=50,
    ),
}

# The best learning rate of `plain`.
BEST_RATES = {
    "mnist-segmentation": 6e-3,
    "cifar10-16-diffusion": 1.2e-2,
    "shakespeare-transformer": 6e-3,
    "shakespeare-fine-tuning": 3e-3,
    "shakespeare-lora": 6e-3,
}

COMPARISONS = {
    **TUNED,
    **{
        f"{name}-wnn-protocol": dataclasses.replace(
            TUNED[name],
            methods=("plain", "wnn", "introspection", "linear", "drift"),
            recorded=("introspection",),
            learning_rates=(rate,),
            own_rates={},
            search_seeds=None,
            evaluation_weights="weights",
        )
        for name, rate in BEST_RATES.items()
    },
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__, benchmark=tuple(TUNED))
