"""The experiment of the WNN paper (Jang et al., ICML 2023): its CNN on CIFAR-10, with all that it was compared with.

    python -m experiments.wnn_paper --data-dir DIR

Four convolutions of 8 to 32 channels and a hidden layer, 24,186 weights; batches of 1,024, random rotations, shifts and
zooms; Adam at 1e-3, 50 epochs of 45 steps, a snapshot after each. WNN and the curve fits jump every 5 epochs, 5 ahead,
the introspection network every 11 epochs, 10 ahead; `drift`, the default of the library, is beside them. 46,000
training images (JPEG re-encoded), where the paper has 50,000, and validation on the other 4,000. `wnn` and
`introspection` are the bundled networks, trained by us on runs of other networks than this one.

The paper's protocol: one fixed learning rate, the weights themselves (`--reading weights`), epochs until the best score
of plain training. Ours differs in that averages of the weights count in all arms, the best reading for each; the other
half of it, every arm at its own best rate, is that of the records of other tasks.

The paper's table (5 trials; epochs, and how much faster than plain training):

| | epochs | faster |
|---|---|---|
| plain | 44 | x1 |
| WNN | 21 | x2.09 |
| linear fit | | x1.33 |
| Introspection | | x1.22 |
| exponential fit | | x0.85 |

**The experiment itself was not run yet**: a full run takes 12 to 16 minutes of a core. The same at images of 16x16 is
the task `cifar10-16-vanilla`, of which two arms have been run for 30 epochs with one seed:

    python -m experiments.wnn_paper --data-dir DIR --task cifar10-16-vanilla --num-steps 1350 --seeds 0

| | validation accuracy after 21, 25, 28, 30 epochs, of the weights | test accuracy |
|---|---|---|
| plain | 47.1, 48.9, 48.2, 50.4 % | 51.0 % |
| wnn | 48.9, 50.2, 49.1, 51.4 % | 52.2 % |

By the paper's protocol WNN gets to the best score of plain training, its last one, after 30 epochs too, so that nothing
is saved; most of the way it is two to four epochs ahead. One seed of scores that go up and down by a point from epoch
to epoch says no more than that. CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; results in `results/wnn-paper/`.
"""

from pathlib import Path

from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.nowcasters import CURVES

# Of the 46,000 images in batches of 1,024.
STEPS_PER_EPOCH = 45

CONFIG = Compare(
    task="cifar10-vanilla",
    arms=("plain", "wnn", "introspection", *CURVES, "drift"),
    learning_rates=(1e-3,),
    num_steps=50 * STEPS_PER_EPOCH,
    evaluate_every=STEPS_PER_EPOCH,
    snapshot_every=STEPS_PER_EPOCH,
    output=Path("runs/wnn-paper"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
