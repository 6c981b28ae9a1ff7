"""Late-phase weights of rank 1, on CIFAR-10 and a network without normalisation layers.

    python -m experiments.late_phase_rank_one --data-dir DIR

Three convolutions of 16, 24 and 24 features, global average pooling and a classifier. Images, optimizer, length and
what is measured are those of `experiments/late_phase.py`. From 60 % of the training on every kernel has factors of its
inputs and outputs, which begin at 1 and have no weight decay: one of each in `rank-1-alone`, which shows what factors
give without an ensemble, 5 members in `rank-1`, 10 in `rank-1-10`.

The paper (von Oswald et al., ICLR 2021) has factors of rank 1 for a recurrent network; see
`experiments/late_phase_lstm.py`.

| what | result |
|---|---|
| this configuration | not run yet |
"""

import dataclasses
import functools
from pathlib import Path

from experiments.averaging import annealed, sgd
from experiments.late_phase import CONFIG as LATE_PHASE
from experiments.late_phase import annealed_in_cycles, late_phase_arm, make_task
from wnn_jax.late_phase import rank_one_mask
from wnn_jax.meta.evaluation.comparison import main
from wnn_jax.meta.tasks.models import ThreeConv
from wnn_jax.meta.training.arm import Arm

ARMS = {
    arm.name: arm
    for arm in (
        Arm("annealed", annealed, is_plain=True),
        late_phase_arm("rank-1-alone", annealed_in_cycles, 1, mask=rank_one_mask),
        late_phase_arm("rank-1", annealed_in_cycles, mask=rank_one_mask),
        late_phase_arm("rank-1-10", annealed_in_cycles, 10, mask=rank_one_mask),
    )
}

CONFIG = dataclasses.replace(
    LATE_PHASE, task="cifar10-16-three-conv", arms=tuple(ARMS), output=Path("runs/late-phase-rank-one")
)

if __name__ == "__main__":
    make_this_task = functools.partial(make_task, model=ThreeConv(features=(16, 24, 24)))
    main(CONFIG, __doc__, make_task=make_this_task, base=sgd, arms=ARMS)
