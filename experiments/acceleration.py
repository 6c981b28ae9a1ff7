"""Steps saved by the default nowcaster and its rivals on several tasks: images, text, reconstruction, denoising.

    python -m experiments.acceleration --data-dir DIR

Every method is at the best of four learning rates, by one seed (10) that is not among the three reported (0, 1, 2), and is
read from the weights or their moving averages, whichever is best. The drift is `wnn_jax.nowcast()` as it is. Its
numbers (gain, bounds, steps and blocks of the orthogonalisation) were chosen on other networks: three convolutions of
12, 20 and 28 channels, a transformer of width 40, a ResNet of 8, 12 and 24 channels; one to three seeds, some on the
same data sets. Its form (a memory of a tenth, visits every 10 steps, matrices orthogonalised) was found earlier on
networks of the sizes of the three-conv net and the transformer below, so that these two are not independent of it.
CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8. The results are in `results/acceleration/`.

| task | network | optimizer | steps |
|---|---|---|---|
| cifar10-16-three-conv | three convolutions, images of 16x16 | Adam | 6,000 |
| mnist-mlp | one hidden layer | Adam | 1,500 |
| mnist-autoencoder | six layers with 16 units in the middle, images of 14x14 | Adam | 6,000 |
| mnist-diffusion | U-Net that denoises | Adam | 3,000 |
| shakespeare-transformer | one-layer transformer of characters | AdamW | 6,000 |

% of steps saved to the best score of the best plain method with the same seed, with 95 % intervals:

| method | three-conv | mlp | autoencoder | diffusion | transformer | mean of 5 |
|---|---|---|---|---|---|---|
| plain | at most 4 (0 to 10) | 5 (0 to 13) | 0 (0 to 0) | none | none | at most 2 (0 to 4) |
| wsd | 2 (0 to 5) | at most 12 (0 to 35) | none | 0 (0 to 0) | 0 (0 to 0) | at most 3 (0 to 7) |
| ademamix-3 | 46 (20 to 69) | at most 7 (0 to 22) | 60 (37 to 76) | | 35 (29 to 40) | |
| ademamix-6 | 45 (34 to 58) | at most 2 (0 to 7) | 69 (53 to 78) | 42 (39 to 46) | 41 (39 to 44) | at most 40 (36-43) |
| drift | 74 (64 to 82) | 21 (8 to 40) | 78 (70 to 83) | 45 (40 to 51) | 35 (25 to 48) | 51 (46 to 55) |
| slow-drift | 41 (33 to 53) | 9 (0 to 17) | | | | |

Final scores of `plain`, `ademamix-6` and `drift`: accuracy 58.55, 62.20, 62.27 %; 97.64, 97.57, 97.71 %; squared error
.0133, .0109, .0101 and .0850, .0809, .0807; perplexity 5.434, 5.249, 5.277 (test 6.231, 6.210, 6.036).

What this says. The drift saves half of the steps on the mean, and more than AdEMAMix by more than both intervals; on
the transformer AdEMAMix with alpha 6 is ahead, within the noise. The goal of 70 % on the mean and of 45 % on every task
is not reached. The MLP has little to gain from: at 6,000 steps it overfits, plain Adam itself saves 40 % of its own
steps, the drift 19 and AdEMAMix 0 to 30 %, all by chance, which is why its training is short here. On the U-Net, plain
Adam, decayed or not, and the drift choose the highest rate of the grid, on the MLP `wsd` does; the lowest is chosen on
the autoencoder by the drift, on the MLP by `ademamix-6` and on the CNN by `slow-drift`.

At other rates than the best (seed 10, final scores of `plain` and `drift`): CNN 53.4 and 61.7 % at 1.5e-3, 56.9 and
62.6 at 3e-3, 57.8 and 60.5 at 6e-3, 59.3 and 60.0 at 1.2e-2; transformer 5.73 and 5.25, 5.50 and 5.24, 5.46 and 5.23,
5.60 and 5.38 at the same rates; U-Net .0917 and .0833, .0877 and .0809, .0858 and .0803, .0836 and .0800; autoencoder
.0110 and .0097, .0107 and .0098, .0114 and .0113, .0148 and **.0183**; MLP 96.7 and 97.7, 97.4 and 97.7, **97.8 and
97.4, 97.7 and 97.5 %**. In bold, where the drift is worse: at four times the best rate of the autoencoder, and on the
MLP.

One seed (10) of a ResNet with batch normalisation under SGD with Nesterov momentum, images of 16x16, 2,000 steps, final
accuracy: plain 62.3, 65.4, 67.5 and 67.1 % at 0.025, 0.05, 0.1 and 0.2, the drift 66.8, 67.8, 68.4 and 68.3, AdEMAMix 6
67.6, 67.5, 67.8 and 66.9 at 1.5e-3 to 1.2e-2.

What was tried to get there (on the other networks; validation loss of the CNN, 3,000 steps at 3e-3, mean of seeds 10
and 11, noise .01; of the transformer at 4e-3, noise .005). Gain per step of memory .03, .05, .1, .2: 1.140, 1.117,
1.135, 1.153; transformer 1.772, 1.765, 1.765, -. Greatest gain 4, 6, 9: 1.154, 1.140, 1.146. Memory of a fifth of the
steps for a tenth: 1.130 for 1.107; 1.769 for 1.765. Four fitted steps of the polar iteration 1.107, five of Muon and
three cubic ones 1.122; 1.765 and 1.772 (at gain .03). Blocks of 12 rows 1.127 for 1.107, of 16 rows 1.772 for 1.765.
Visits every 20 steps 1.119 for 1.120 (one seed). Means in bfloat16 1.119 for 1.120; 1.776 for 1.780. With a decayed
rate, where it is 1.120 and 1.780 without: warm-up-stable-decay 1.123 and 1.785, cosine 1.157 and 1.799, both no better.
Attention kernels as `[-1, head_dim]` or head by head instead of `[d_model, heads * head_dim]`: 1.772, 1.768 for 1.770
(three seeds). Embeddings orthogonalised as well: 1.770 for 1.772. Without the bound by the norm of the weights
(`reach`), 2.4e-2 ruined both: 1.451 and 2.827, where plain Adam had 1.331 and 1.842; with it 1.347 and 1.841, at 1.2e-2
1.183 for 1.245, and nothing changed at the best rates. The square of that bound is no better (1.327 at 2.4e-2, 1.201 at
1.2e-2). The signal of the mean beside its noise tells nothing: it is 1 throughout, that is, the mean is no longer than
that of a random walk would be.

A learned drift (`wnn_jax.nowcasters.LearnedDrift`, 15 numbers, 256 short trainings of MLPs) was no better than the rule
on held-out runs: lower by -0.3 % (-1.5 to 0.9) in the logarithm of the loss, 1.5 % (0.4 to 2.7) on other MLPs and -1.4
% (-2.8 to 0.0) on a CNN, a kind that it was not trained on.
"""

from pathlib import Path

from wnn_jax.lab.comparing.comparison import Compare
from wnn_jax.lab.comparing.survey import Survey, main

PLAIN = ("plain", "wsd")
METHODS = (*PLAIN, "ademamix-3", "ademamix-6", "drift")

LOWER = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
HIGHER = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEARCH_SEEDS = (10,)

COMPARISONS = (
    Compare(
        task="cifar10-16-three-conv",
        methods=(*METHODS, "slow-drift"),
        optimizer="adam",
        learning_rates=RATES,
        own_rates={**dict.fromkeys(PLAIN, HIGHER), "ademamix-6": LOWER},
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    Compare(
        task="mnist-mlp",
        methods=(*METHODS, "slow-drift"),
        optimizer="adam",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=1_500,
        evaluate_every=25,
    ),
    Compare(
        task="mnist-autoencoder",
        methods=METHODS,
        optimizer="adam",
        learning_rates=RATES,
        own_rates=dict.fromkeys(("ademamix-3", "ademamix-6", "drift"), LOWER),
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
    Compare(
        task="mnist-diffusion",
        methods=(*PLAIN, "ademamix-6", "drift"),
        optimizer="adam",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=3_000,
        evaluate_every=100,
    ),
    Compare(
        task="shakespeare-transformer",
        methods=METHODS,
        optimizer="adamw",
        learning_rates=RATES,
        search_seeds=SEARCH_SEEDS,
        num_steps=6_000,
        evaluate_every=100,
    ),
)

CONFIG = Survey(output=Path("runs/acceleration"))

if __name__ == "__main__":
    main(CONFIG, COMPARISONS, __doc__)
