"""Nowcasters that see neurons, on a small CNN on CIFAR-10 at 16x16, with Adam: NiNo, and pooled histories.

    python -m experiments.neuron_interaction --data-dir DIR
    python -m experiments.neuron_interaction --data-dir DIR --methods plain drift WNN.npz~40-1 NINO.npz~40-1 POOLED.npz

Three convolutions of 16, 24 and 24 features, batches of 128, 3,000 steps; snapshots every 60 steps and jumps every 300,
a fiftieth and a tenth of the training, as in NiNo's paper, `~40-1` its decaying horizon. The published networks cannot
be shipped: `wnn_jax.convert.nino` and `nino_mlp` read them, `wnn_jax.save` writes what the second call names. Our own
are bundled as `nino` and `pooled`. The commands that made them are below.

**Steps saved** to the best loss of `plain` with the same seed; 3 seeds, mean and 95 % interval; every method at the best
of three rates and read from the weights or a moving average, both chosen on the validation split. CPU, 2 cores; Python
3.11, jax 0.10.2, optax 0.2.8. The results are in `results/neuron-interaction/`.

| method | rate | read from | steps saved % | loss | test loss | test accuracy % |
|---|---|---|---|---|---|---|
| plain | 6e-3 | EMA .99 | 0 (0 to 0) | 1.1887 ± .0154 | 1.1683 ± .0144 | 58.5 |
| drift | 3e-3* | EMA .998 | **56** (54 to 61) | **1.0812** ± .0108 | **1.0651** ± .0045 | **62.6** |
| NiNo, published, ~40-1 | 6e-3 | EMA .99 | 45 (41 to 51) | 1.1228 ± .0039 | 1.1086 ± .0069 | 60.7 |
| WNN+, published, ~40-1 | 6e-3 | EMA .99 | 22 (11 to 28) | 1.1577 ± .0251 | 1.1260 ± .0113 | 59.9 |
| pooled | 6e-3 | EMA .99 | 18 (14 to 23) | 1.1621 ± .0150 | 1.1382 ± .0087 | 59.8 |

* at the lower edge of the grid. `pooled` jumps 5 snapshots ahead, all the time; it is not the bundled one, but one
that was trained on 6 runs.

On the character transformer of `experiments/shakespeare.py`, AdamW, 3,000 steps with as many snapshots and jumps, 3
seeds, every method at the better of 3e-3 and 6e-3 and read from the EMA of .99; the results are in
`results/neuron-interaction-transformer/`:

| method | rate | steps saved % | loss | perplexity | test loss |
|---|---|---|---|---|---|
| plain | 6e-3 | 0 (0 to 0) | 1.7353 ± .0025 | 5.671 ± .014 | 1.8535 ± .0038 |
| drift | 3e-3 | **34** (30 to 36) | **1.7003** ± .0089 | **5.476** ± .049 | **1.8295** ± .0175 |
| NiNo, published, ~40-1 | 6e-3 | 17 (12 to 24) | 1.7205 ± .0058 | 5.588 ± .032 | 1.8403 ± .0088 |
| WNN+, published, ~40-1 | 6e-3 | 15 (11 to 20) | 1.7250 ± .0019 | 5.612 ± .010 | 1.8436 ± .0137 |

**Our own NiNo**, trained in 1,500 steps on 43 runs (`params/nino.json` names them; 22 minutes of one core) and bundled
as `nino`, beside the other bundled networks, jumping as the published one does. On the three-conv net with 6 seeds at
6e-3, the best of the three rates for each with the first 3 seeds; on the transformer with 3 seeds, at the better of two
rates, and with Adam. The results are in `results/neuron-interaction-trained-by-us/` and
`results/neuron-interaction-transformer-trained-by-us/`, where it is called `nino5`:

| method | three-conv: steps saved % | loss | test loss | transformer: steps saved % | loss |
|---|---|---|---|---|---|
| plain | 0 (0 to 0) | 1.1896 ± .0144 | 1.1723 ± .0103 | 0 (0 to 0) | 1.7349 ± .0025 |
| nino~40-1 | **27** (23 to 31) | **1.1523** ± .0097 | **1.1319** ± .0056 | at most 2 (0 to 7) | 1.7333 ± .0078 |
| wnn-plus~40-1 | 22 (15 to 28) | 1.1588 ± .0165 | 1.1412 ± .0090 | at most 3 (0 to 10) | 1.7363 ± .0114 |
| adaptive-linear | 21 (14 to 28) | 1.1597 ± .0127 | 1.1428 ± .0114 | at most 6 (0 to 12) | 1.7338 ± .0110 |

Seed by seed it saves 5 points more than `wnn-plus` (1 to 9), and 5 more than `adaptive-linear` (-1 to 11). Another
training, of 2,000 steps on 42 runs (`nino4`), saves as much: 27 % (22 to 31), 5 points (0.5 to 9.5) and 6 (-1 to 11)
more than these. On the transformer none of them saves anything.

Signs of models and of eigenvectors are drawn in its training. Without that the error on the validation runs was .836
after 1,000 steps whose rate decays to 0, and between .857 and .885 on the way to 4,000, while that on the training runs
fell to .72; with it, .828 after 1,500 of 2,000 steps and .830 after 2,000.

**Pools of the same neuron in other tensors**: where the graph can be read, a row or a column was told the pools of its
neuron as output and as input of the other tensors too. Of the same runs, one seed, 600 steps, forecast errors on
validation and test runs: .809 and .755 without, .812 and .750 with. Nothing is gained, and it is not in the code.

**All of them in one table**: forecast errors, as shares of those of forecasting no change, of all weights of four runs
that `pooled` and `nino` were neither trained on nor selected by, one of a transformer (1 layer of 32 features,
tiny_shakespeare, SGD) and three of a three-conv net (24-24-48, CIFAR-10 at 16x16); and % of steps saved on the two
tasks above, in the best of the ways of jumping that were tried with each, which flatters those with several. The errors
are in `results/forecasts/graph-and-pooled/`, where `nino` is called `nino5` and `pooled` `pooled2`. CPU; Python 3.11,
jax 0.10.2; one training of each network.

| | transformer, 5 ahead | 20 ahead | three-conv, 5 ahead | 20 ahead | saved, three-conv | transformer |
|---|---|---|---|---|---|---|
| adaptive-linear (a) | **.725** | **.848** | **.796** | .894 | 30 (24 to 36) | 15 (13 to 17) |
| pooled | .739 | .862 | **.796** | **.892** | 30 (23 to 37) | 18 (15 to 23) |
| wnn-plus (a) | .863 | .952 | .863 | .923 | 22 (15 to 28) | at most 3 (0 to 10) |
| nino | .878 | .955 | .870 | .942 | 35 (29 to 41) | 10 (7 to 15) |
| WNN+, published | .895 | 1.008 | .875 | .992 | 22 (11 to 28) | 15 (11 to 20) (b) |
| NiNo, published | .974 | .986 | .847 | .941 | 45 (41 to 51) | 17 (12 to 24) (b) |
| drift | | | | | **56** (54 to 61) | **34** (30 to 36) (b) |

(a): trained on earlier runs of such networks, which may favour its errors; (b): under AdamW. Errors rank neither the
networks of one task nor the two kinds.

    wnn-jax train --kind pooled --collection small pooled --output DIR --num-steps 1000 --windows-per-role 8
    wnn-jax train --kind nino --collection small pooled --output DIR --num-steps 1500 --learning-rate 1e-3
        --validate-every 250 --num-weights 64

made the bundled ones, from 43 runs each. A first `pooled`, of 6 runs, a NiNo of 10 and `adaptive-linear` of the same 6
had .758, .900 and .776 on that transformer, .768, .952 and .768 on one run of the three-conv net, 5 ahead.

On validation and test runs together (two each, all horizons) that `pooled` had .770 and .803 where `adaptive-linear`
has .778 and .802. A network that is given each weight's own history beside the pooled ones, as `adaptive-linear` is,
has .773 and .791: the pooled coefficients lose little, and take some fifty multiply-adds a weight instead of nine
thousand.

**In the drift** pooled histories win nothing. Validation loss after the same 3,000 steps (two seeds), and of the
character transformer (3,000 steps, one seed), at 3e-3; `drift` changed in these ways, of which none is in the code:

| | three-conv | transformer |
|---|---|---|
| plain | 1.3091 | 1.7597 |
| `drift` | 1.0788 ± .0041 | **1.7021** |
| the mean shrunk by the signal of its rows and columns (James-Stein), then orthogonalised | 1.0936 ± .0148 | 1.7085 |
| the same, orthogonalised first | 1.1125 ± .0027 | 1.7074 |
| rows and columns of the jump brought to one length | **1.0767** ± .0047 | |
| the jump scaled by how far two memories agree, by row and column | 1.0798 ± .0048 | |
| orthogonalised in units of the displacement's rows and columns | 1.0771 ± .0113 | |

**NiNo behind the drift**, in one chain: validation loss at the end on the three-conv net at 3e-3, of seeds 10 and 11,
which are not among those above; by a script that is not kept:

| | seed 10 | seed 11 |
|---|---|---|
| `plain` | 1.332 | 1.299 |
| `drift` | 1.112 | **1.081** |
| drift, then NiNo, whose jumps make the drift begin anew | 1.142 | 1.123 |
| the same with half of the jump | 1.123 | |
| the same from 10 ahead at first instead of 40 | 1.117 | |
| the drift is told of the jumps and goes on | 1.282 | |
| NiNo in the first third only, half of the jump, 40 ahead | **1.098** | 1.087 |
| `adaptive-linear` instead, every 30 steps, in the first third, 10 ahead | 1.109 | |

**Nearer snapshots, a farther horizon, and running means.** Snapshots every 20 steps instead of 60, jumps every 100, 20
snapshots ahead; `+ema` gives a nowcaster snapshots of the weights' running mean with a memory of one spacing,
`nowcast(average=1 - 1 / snapshot_every)`. The bundled networks, `pooled` among them (in the results it is called
`pooled2`), and `adaptive-linear-average`, which was trained on running means, at 6e-3, of three rates the best for
`adaptive-linear~20+ema` with the first 3 seeds; % of steps saved to the best loss of `plain` with the same seed. The
first two rows are those of the table above. The results are in `results/neuron-interaction-averages/` and
`results/neuron-interaction-transformer-averages/`; spacing, memory and horizon were chosen with seeds 10 and 11 of the
three-conv net, and nothing on the transformer:

| method | three-conv, 6 seeds | loss | test loss | transformer, 3 seeds, Adam | loss | test loss |
|---|---|---|---|---|---|---|
| adaptive-linear, every 60 steps, 10 ahead | 21 (14 to 28) | 1.1597 | 1.1428 | at most 6 (0 to 12) | 1.7338 | |
| nino~40-1, every 60 steps | 27 (23 to 31) | 1.1523 | 1.1319 | at most 2 (0 to 7) | 1.7333 | |
| adaptive-linear~20 | 26 (21 to 31) | 1.1514 | 1.1378 | at most 7 (0 to 15) | 1.7289 | 1.8559 |
| adaptive-linear~20+ema | 30 (24 to 36) | 1.1479 | **1.1256** | 15 (13 to 17) | 1.7245 | 1.8502 |
| nino~20 | **35** (29 to 41) | 1.1426 | 1.1313 | 10 (7 to 15) | 1.7275 | 1.8512 |
| nino~20+ema | 33 (27 to 38) | 1.1464 | 1.1310 | 7 (0 to 13) | 1.7302 | **1.8432** |
| pooled~20 | 26 (19 to 33) | 1.1540 | 1.1321 | **18** (15 to 23) | 1.7248 | 1.8446 |
| pooled~20+ema | 30 (23 to 37) | 1.1446 | 1.1263 | 17 (12 to 26) | **1.7242** | 1.8468 |
| NiNo, published, ~20, 3 seeds | at most 26 (0 to 51) | 1.1816 | 1.1705 | | | |
| adaptive-linear-average~20+ema | 31 (25 to 36) | **1.1413** | 1.1275 | 11 (4 to 16) | 1.7282 | 1.8440 |
| plain | 0 | 1.1896 | 1.1723 | 0 | 1.7349 | 1.8551 |

Seed by seed, in points, with 95 % intervals: by spacing and horizon alone `nino` gains 9 (4 to 14) on the three-conv
net and 8 (2 to 15) on the transformer; running means add nothing to that (-2, -5 to 2, and -3, -15 to 3), and to the
others, on the three-conv net, 5 (-1 to 10, `adaptive-linear`) and 4 (0 to 11, `pooled`), on the transformer 8 and 0.
There `nino` is 5 points (2 to 8) ahead of the better forms of both others; on the transformer `pooled` is 7 (0 to 14)
ahead of `nino`, and level with `adaptive-linear~20+ema` (3, -2 to 9), for some fifty multiply-adds a weight. That is
why it is bundled. The published NiNo, which was trained on snapshots 200 steps apart, is worse from near ones than from
far ones. *Training* on running means gains nothing, though forecasts of them are much better: the errors on the
validation runs are .745 (`adaptive-linear`) and .737 (NiNo) of those of no change, where some .78 and .83 are reached
of the weights. `adaptive-linear-average` and `nino-average` are

    wnn-jax train --average --collection small pooled --output DIR --num-steps 1000 --windows-per-role 16
    wnn-jax train --average --kind nino --collection small pooled --output DIR --num-steps 1500 --learning-rate 1e-3
        --validate-every 250 --num-weights 64

by a trial of that option which left out of a mean what was more than four memories ago. What else was tried on seed 10,
where `plain` ends at 1.260 (seeds differ by .03, so that only large differences mean anything), all with `+ema`:

- `adaptive-linear-average` every 20 steps: 10 ahead 1.251, 20 1.169, 40 1.183, from 40 to 1 1.186; 10 ahead with twice
  the jump 1.197, three times 1.195. As far ahead every 10 steps 1.214, every 40 1.216; 10 ahead every 60 steps 1.245.
- A memory of three spacings 1.174, and of four, trained on such means, 1.184.
- `adaptive-linear`: 10 ahead 1.194, with 1.5 and 2 times the jump 1.236, 1.207; 20 ahead 1.187, of the weights 1.218;
  10 ahead every 60 steps 1.227, of the weights 1.219. A memory of three spacings 1.216 (20 ahead) and 1.220 (10).
- `nino~20` 1.181, `nino-average~20` 1.183, `~40` 1.199; `nino-average~40-1` every 60 steps 1.195; `wnn-plus~20` 1.235.
- The transformer with AdamW, seed 10: `adaptive-linear-average` 20 ahead 1.7317, 10 ahead 1.7327, `plain` 1.7444.

Before that, with a mean of .99 a step and 60 steps between snapshots, on seed 10 too: `plain` 1.253, the published NiNo
1.171, on averages 1.213, on averages every 20 steps 1.238; `pooled` on averages 1.224, every 20 steps 1.220.

What this says. The gain of the published NiNo does not vanish under tuning and averaging, as that of all window
nowcasters before it did. On the three-conv net it saves 45 % of the steps, twice as much as WNN+ with the same
snapshots and jumps, and its loss differs less from seed to seed. The paper says 56.8 and 45.1 % for the larger net that
it was trained on, by its protocol; this net is smaller than that one and of the same form, on images of a quarter of
the size. On the transformer, of a form that it was trained on too, it saves 17 % and is level with WNN+. The drift,
which knows nothing of any network, saves more on both, and nothing is gained by the two together. Errors of forecasts
do not rank the two kinds. Our own NiNo learned from 43 runs, where the published one had 1,000; jumping as it does, it
is a little ahead of the other bundled networks on the one, and level with them on the other. More is gained by nearer
snapshots and a farther horizon, and for networks that do not see the graph by running means, without any new training:
so all three of ours save on both tasks, `nino` most on the three-conv net, if less than the published one, and `pooled`
on the transformer as much as that saved there by its own way of jumping. Without any graph, pools of rows and columns
are enough for that.
"""

from pathlib import Path

from wnn_jax.lab.comparing.comparison import Compare, main

CONFIG = Compare(
    task="cifar10-16-three-conv",
    methods=("plain", "drift", "nino~40-1", "wnn-plus~40-1", "adaptive-linear"),
    learning_rates=(3e-3, 6e-3, 1.2e-2),
    seeds=(0, 1, 2),
    num_steps=3_000,
    evaluate_every=100,
    # A fiftieth of the training.
    snapshot_every=60,
    metric="loss",
    output=Path("runs/neuron-interaction"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__)
