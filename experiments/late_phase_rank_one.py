"""Late-phase weights of rank 1, on CIFAR-10 and a network without normalisation layers.

    python -m experiments.late_phase_rank_one --data-dir DIR

Three convolutions of 16, 24 and 24 features, global average pooling and a classifier. Images, optimizer, length and
what is measured are those of `experiments/late_phase.py`. From 60 % of the training on every kernel has factors of its
inputs and outputs, which begin at 1 and have no weight decay: one of each in `rank-1-alone`, which shows what factors
give without an ensemble, 5 members in `rank-1`, 10 in `rank-1-10`.

The paper (von Oswald et al., ICLR 2021) has factors of rank 1 for a recurrent network; see
`experiments/late_phase_lstm.py`.

CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 5 seeds; the results are in `results/late-phase-rank-one/`. Rates
are the best of six by a seed of their own, that of `rank-1` the lowest of these; read from the weights, which is best
for all methods. Mean ± standard deviation at the end, on the test split:

| method | rate | accuracy % | negative log-likelihood |
|---|---|---|---|
| annealed | 0.4 | 52.59 ± 1.81 | 1.316 ± 0.044 |
| rank-1-alone | 0.4 | 52.65 ± 1.84 | 1.338 ± 0.038 |
| rank-1 | 0.025 | 34.92 ± 4.25 | 1.772 ± 0.086 |
| rank-1-10 | 0.05 | 18.81 ± 5.98 | 2.164 ± 0.111 |

With seed 10, 5 members end at 34.9 % (0.025), 33.2 (0.05), 16.9 (0.1) and at chance from there on; 10 at 20.6, 21.7 and
at chance; `annealed` at 40.6 and 45.5 at the two lowest. At 0.8 all methods are at chance. At 0.05, with 5 seeds, `rank-1`
has 33.39 ± 4.29 %.

What this says. **Without normalisation layers the sum of the gradients of a cycle breaks the network**, which the same
sum leaves whole where there is batch normalisation (`experiments/late_phase.py`). It is no matter of the factors, of
which a single set changes nothing, nor of averaging the members, which alone are as bad (33.3 % as an ensemble): the
training loss itself jumps, from 1.57 to 2.07 at 0.05, when the shared weights begin to take one step that is 5 times as
long in the place of 5 steps. A network that was trained to the longest steps that it bears has no room for that; scales
that do not matter, as before a normalisation layer, make room by themselves.

With the mean of the gradients in the place of their sum (`base_gradient_scale=1 / num_members`), by hand, seed 10, 5
members, validation accuracy at the end, the best reading:

| | 0.1 | 0.2 | 0.4 |
|---|---|---|---|
| annealed | 51.05 | 51.92 | **53.77** |
| rank-1-alone | 51.92 | 53.50 | **53.80** |
| rank-1, mean of gradients | 50.25 | 51.68 | 52.85 |

So they train, and gain nothing: shared weights then go a fifth of the way.
"""

import dataclasses
import functools
from pathlib import Path

from experiments.averaging import annealed, sgd
from experiments.late_phase import CONFIG as LATE_PHASE
from experiments.late_phase import annealed_in_cycles, late_phase_method, make_task
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.tasks.models import ThreeConv
from wnn_jax.lab.training.method import Method
from wnn_jax.late_phase import rank_one_mask

METHODS = {
    method.name: method
    for method in (
        Method("annealed", annealed, is_plain=True),
        late_phase_method("rank-1-alone", annealed_in_cycles, 1, mask=rank_one_mask),
        late_phase_method("rank-1", annealed_in_cycles, mask=rank_one_mask),
        late_phase_method("rank-1-10", annealed_in_cycles, 10, mask=rank_one_mask),
    )
}

CONFIG = dataclasses.replace(
    LATE_PHASE,
    task="cifar10-16-three-conv",
    methods=tuple(METHODS),
    learning_rates=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    output=Path("runs/late-phase-rank-one"),
)

if __name__ == "__main__":
    make_this_task = functools.partial(make_task, model=ThreeConv(features=(16, 24, 24)))
    main(CONFIG, __doc__, make_task=make_this_task, base=sgd, methods=METHODS)
