"""Drifts beneath averages of weights and late-phase weights, in one table: what is gained by both together.

    python -m experiments.together --data-dir DIR

Task, length and optimizer are those of `experiments/averaging.py`: a ResNet on half of CIFAR-10 at 16x16, SGD with
momentum, 33 epochs in all. So are all methods but the last two, which anneal the rate and have, from 60 % of the training
on, 5 members of the scales and shifts of all batch normalisation, as in `experiments/late_phase.py`; with a drift, the
shared weights and each member's own have one. Every method but TWA, whose coefficients have one rate, is at its best rate
by one seed (10) that is not among the three reported, which lies inside its grid: 0.4 without and 0.8 with a drift for
the late-phase weights.

CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 3 seeds; plots, table and the runs of the last two methods are in
`results/together/`, the other runs in `results/averaging/`. Accuracies at the end in %, mean ± standard deviation;
under them what the drift adds with each of the seeds:

| | EMA .998 | SWA | LAWA | TWA | late-phase, EMA .998 |
|---|---|---|---|---|---|
| validation, without a drift | 63.54 ± 1.17 | 63.00 ± 1.21 | 62.44 ± 1.39 | 63.27 ± 1.42 | 62.98 ± 1.12 |
| with | 64.28 ± 0.49 | 63.35 ± 1.00 | 63.85 ± 0.52 | 63.59 ± 0.95 | 63.28 ± 1.36 |
| adds, by seed | 1.2, 1.4, -0.4 | -0.4, 1.9, -0.4 | 1.6, 2.7, -0.1 | 0.4, 1.3, -0.7 | 2.4, 0.9, -2.4 |
| test, without a drift | 63.72 ± 0.80 | 63.09 ± 0.63 | 62.88 ± 0.68 | 63.39 ± 0.35 | 63.24 ± 0.65 |
| with | **64.00** ± 0.55 | 63.60 ± 0.38 | 63.60 ± 0.75 | 63.62 ± 0.83 | 63.87 ± 1.52 |
| adds, by seed | 0.1, 1.1, -0.3 | 0.0, 1.6, -0.1 | 0.2, 1.8, 0.2 | -0.6, 1.1, 0.1 | 1.9, 1.2, -1.3 |

Annealed SGD has 63.80 ± 0.73 (test 63.35 ± 0.52); steps saved to its end, with 95 % intervals: drift 8 % (4 to 15, all
seeds reach it), drift under late-phase weights at most 17 (0 to 32, 2 of 3), late-phase weights at most 7 (0 to 22, 1
of 3), TWA at most 3 (0 to 8) and after a drift at most 5 (0 to 15, 1 of 3 each).

What this says. On the mean a drift adds 0.2 to 1.4 points to whatever is done with the weights afterwards, but not with
every seed, so that three of them confirm none of these gains, and least those of TWA and SWA. It adds most to LAWA, the
mean of the fewest and latest weights. Nothing that comes on top of a drift is better than the EMA of its weights, which
costs nothing: TWA after a drift is 0.4 points below, late-phase weights under one are level on the test split and a
point below on the validation split. Late-phase weights alone are level with annealed SGD, as in the shorter trainings
of `experiments/late_phase.py`.
"""

import dataclasses
from pathlib import Path

from experiments import averaging, late_phase
from wnn_jax.lab.comparing.comparison import main

LATE_PHASE = ("late-phase", "drift-late-phase")
METHODS = {
    **{name: averaging.METHODS[name] for name in ("annealed", "averages", "drift", "twa-adam", "drift-twa")},
    **{name: late_phase.METHODS[name] for name in LATE_PHASE},
}

CONFIG = dataclasses.replace(
    averaging.CONFIG,
    methods=tuple(METHODS),
    own_rates={**averaging.CONFIG.own_rates, **dict.fromkeys(LATE_PHASE, (0.1, 0.2, 0.4, 0.8, 1.6))},
    output=Path("runs/together"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, make_task=averaging.make_task, base=averaging.sgd, methods=METHODS)
