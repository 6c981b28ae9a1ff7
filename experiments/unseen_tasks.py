r"""Tasks of the papers beyond CIFAR-10: segmentation, diffusion, a language model, fine-tuning, ImageNet and poses.

    python -m experiments.unseen_tasks --data-dir DIR

Jang et al. (ICML 2023) report how much faster networks of kinds that WNN never saw reach a fixed score with it; Knyazev
et al. (ICLR 2025) do so for language models. Here every method is at the best of its learning rates, by one seed (10) that
is not among the three reported (0, 1, 2), and is read from the weights or their moving averages, whichever is best; the
drift is `wnn_jax.nowcast()` as it is. Reinforcement learning has a record of its own, `experiments/pendulum.py`, and so
has the paper's CNN, `experiments/wnn_paper.py`; diffusion on MNIST is in `experiments/acceleration.py`, with its
samples in `experiments/diffusion.py`. CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8. The results are in
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

% of steps saved to the best score of the better of the plain methods, `plain` and `wsd`, with the same seed, with 95 %
intervals; `wsd` is warm-up-stable-decay, the last fifth of the steps decayed to 0:

| method | segmentation | diffusion | language model | fine-tuning | LoRA | mean of 5 |
|---|---|---|---|---|---|---|
| plain | at most 0 (0 to 0) | none | none | 0 (0 to 0) | at most 8 (0 to 25) | at most 2 (0 to 5) |
| wsd | 0 (0 to 0) | 0 (0 to 0) | 0 (0 to 0) | at most 1 (0 to 2) | 10 (0 to 25) | at most 2 (0 to 5) |
| ademamix-6 | 9 (3 to 21) | 31 (26 to 34) | 46 (44 to 50) | 14 (8 to 25) | at most 18 (0 to 32) | at most 24 (20-28) |
| drift | 24 (21 to 29) | 20 (20 to 20) | 45 (35 to 54) | 14 (8 to 25) | 29 (21 to 33) | 26 (24 to 29) |
| drift+wsd | 25 (21 to 29) | 20 (20 to 20) | 45 (35 to 54) | 21 (14 to 35) | 29 (21 to 33) | 28 (25 to 31) |

Final scores, mean ± standard deviation on the validation split, with the mean on the test split behind them:

| method | segmentation, mean IoU % | diffusion, squared error | language model, perplexity |
|---|---|---|---|
| plain | 41.40 ± 0.30, 42.20 | .0968 ± .0004, .0989 | 5.296 ± 0.056, 6.131 |
| wsd | 41.50 ± 0.37, 42.21 | .0965 ± .0003, .0987 | 5.264 ± 0.047, 6.131 |
| ademamix-6 | 42.91 ± 0.95, 44.06 | .0936 ± .0002, .0957 | 5.156 ± 0.042, 6.163 |
| drift | 44.92 ± 0.37, 45.97 | .0946 ± .0003, .0966 | 5.127 ± 0.041, 6.155 |
| drift+wsd | 44.32 ± 0.29, 45.51 | .0947 ± .0003, .0968 | 5.129 ± 0.044, 6.229 |

| method | fine-tuning, perplexity | LoRA, perplexity |
|---|---|---|
| plain | 5.368 ± 0.015, 6.324 | 6.004 ± 0.087, 6.553 |
| wsd | 5.370 ± 0.008, 6.313 | 5.991 ± 0.082, 6.551 |
| ademamix-6 | 5.336 ± 0.002, 6.333 | 5.950 ± 0.025, 6.517 |
| drift | 5.334 ± 0.003, 6.340 | 5.936 ± 0.062, 6.529 |
| drift+wsd | 5.331 ± 0.005, 6.316 | 5.938 ± 0.052, 6.543 |

| method | segmentation | diffusion | language model | fine-tuning | LoRA |
|---|---|---|---|---|---|
| plain | 6e-3 | 1.2e-2 | 6e-3 | 3e-3 | 6e-3 |
| wsd | 6e-3 | 1.2e-2 | 6e-3 | 3e-3 | 6e-3 |
| ademamix-6 | 3e-3 | 6e-3 | 3e-3 | 7.5e-4 | 1.5e-3 |
| drift | 3e-3 | 1.2e-2 | 3e-3 | 7.5e-4 | 3e-3 |
| drift+wsd | 3e-3 | 1.2e-2 | 3e-3 | 1.5e-3 | 3e-3 |

All rates lie inside their grids but those of the language model, which were chosen between two, the best of four after
6,000 steps. With one seed, `wnn-plus~40-1` saved 16 % of the language model's steps (the run was not kept).

**By the protocol of WNN's paper**: one fixed rate, the best of `plain` above, and the weights alone; 30 snapshots, a
jump every fifth, and of `introspection` every eleventh; the bundled networks, which saw none of these tasks. % of steps
saved to the best score of `plain` with the same seed, 3 seeds, with 95 % intervals; under the names of the tasks what
the paper says of its own (x1.20 is 17 %):

| method | segmentation | diffusion | language model | fine-tuning |
|---|---|---|---|---|
| the paper: WNN, Introspection, linear fit | 17, 17, 9 | 19, -12, -69 | 13, -2, -5 | 17, -122, 17 |
| plain | 2 (0 to 5) | 3 (0 to 10) | 5 (0 to 16) | 6 (3 to 7) |
| wnn | 7 (1 to 13) | 8 (3 to 12) | 13 (1 to 20) | 18 (5 to 38) |
| introspection | 11 (1 to 21) | 10 (4 to 15) | 15 (1 to 24) | 18 (5 to 38) |
| linear | at most 3 (0 to 9) | at most 4 (0 to 11) | 22 (18 to 25) | 20 (10 to 41) |
| drift | at most 15 (0 to 27) | 18 (4 to 30) | **43** (31 to 50) | none |

Tables and plots of these are in the folders `wnn-protocol/` beside those of the tasks. The second of these columns is
made by the following call, the others by the same one with the task, the optimizer, the rate, the steps and the
evaluations of the configuration and the table above:

    wnn-jax compare --task cifar10-16-diffusion --methods plain wnn introspection linear drift --reading weights \
        --learning-rates 1.2e-2 --num-steps 1200 --evaluate-every 120 --data-dir DIR \
        --output runs/unseen-tasks/cifar10-16-diffusion

By the same protocol on LoRA, at 6e-3: plain 13 (0 to 25), wnn 22 (17 to 28), introspection 17 (4 to 25), linear 20 (12
to 27), drift at most 7 (0 to 21, one seed of three reaches it). ImageNet and COCO could not be had: their tasks are
tested on data of the same shapes, written by TensorFlow Datasets, and run on any folder that it has prepared.

What this says. On the mean of the five tasks the drift and AdEMAMix are level, within the noise. On the language model
the drift saves 45 % of 10,000 steps, as AdEMAMix does; of 6,000 steps it saved 35 % (`experiments/acceleration.py`). On
the segmentation it saves a quarter, 1.32 times as fast, beside 1.20 of WNN in its paper on other images, and is ahead
of AdEMAMix, whose interval touches its own. On the diffusion it is the other way round: 1.25 times as fast, beside 1.23
in the paper, and behind AdEMAMix, whose interval lies above its own. On the fine-tuning, which is short, both gain
little and alike. Of low-rank adapters the drift saves 29 %, but plain training there goes up again before its end,
decayed or not, so that it "saves" some 10 % against its own best; the intervals of all touch. A rate that is decayed to
0 in the end is worth as much as an average of the weights: `wsd` is level with `plain` on four tasks and a little
ahead, with every seed, on the language model, the drift far ahead of both, and with a decay of its own it gains on the
fine-tuning only, within the noise. On the test text no method of the three language tasks is better than plain training by
more than the noise. By the protocol of WNN's paper, WNN is ahead of plain training on all four tasks, by about half of
what the paper says on the first two and by as much on the others, with intervals that touch those of plain training on
all of them; Introspection is level with it, and a linear fit of the weights saves as much on the fine-tuning and more
on the language model, the only gain of these three that is clear. The drift saves most on the diffusion, where its best
rate is that of plain training, and, twice as much as the linear fit, on the language model, where its own is half of it
(test perplexity 6.33 ± .11, plain 6.50 ± .14). On the segmentation, at twice its own rate as well, its gain is not
confirmed, and at four times its own, on the fine-tuning, there is none: the rate has to be searched for it.
"""

from pathlib import Path

from wnn_jax.lab.comparing.comparison import Compare
from wnn_jax.lab.comparing.survey import Survey, main

METHODS = ("plain", "wsd", "ademamix-6", "drift", "drift+wsd")

LOWER = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
LOWEST = (3.75e-4, *LOWER)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEEDS = (10,)

COMPARISONS = (
    Compare(
        task="mnist-segmentation",
        methods=METHODS,
        optimizer="adam",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=60,
    ),
    Compare(
        task="cifar10-16-diffusion",
        methods=METHODS,
        optimizer="adam",
        learning_rates=HIGHER,
        own_rates={"ademamix-6": RATES},
        search_seeds=SEARCH_SEEDS,
        num_steps=1_200,
        evaluate_every=120,
    ),
    # The rates are the best two of four of each method after 6,000 steps, in `experiments/acceleration.py`.
    Compare(
        task="shakespeare-transformer",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=(3e-3, 6e-3),
        own_rates={"wsd": (3e-3, 6e-3, 1.2e-2), "ademamix-6": (1.5e-3, 3e-3)},
        search_seeds=SEARCH_SEEDS,
        num_steps=10_000,
        evaluate_every=200,
    ),
    Compare(
        task="shakespeare-fine-tuning",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=RATES,
        own_rates=dict.fromkeys(("ademamix-6", "drift", "drift+wsd"), LOWEST),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=50,
    ),
    Compare(
        task="shakespeare-lora",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=HIGHER,
        own_rates=dict.fromkeys(("ademamix-6", "drift", "drift+wsd"), (7.5e-4, *RATES)),
        search_seeds=SEARCH_SEEDS,
        num_steps=1_000,
        evaluate_every=50,
    ),
    Compare(
        task="imagenet-64-resnet",
        methods=METHODS,
        optimizer="adam",
        learning_rates=LOWER,
        search_seeds=SEARCH_SEEDS,
        num_steps=50_000,
        evaluate_every=1_000,
        snapshot_every=1_000,
    ),
    Compare(
        task="coco-pose-unet",
        methods=METHODS,
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
