"""Late-phase weights of rank one on a CNN without normalisation layers.

    python -m experiments.late_phase_rank_one --data-dir DIR

The record is `late_phase_rank_one.md`.
"""

import dataclasses
import functools

from experiments.averaging import annealed
from experiments.late_phase import LATE_PHASE, annealed_in_cycles, late_phase_method, make_task
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.tasks.models import ThreeConv
from wnn_jax.lab.training.method import Method
from wnn_jax.late_phase import rank_one_mask

METHODS = {
    method.name: method
    for method in (
        Method("annealed", annealed, is_baseline=True),
        late_phase_method("rank-1-alone", annealed_in_cycles, 1, mask=rank_one_mask),
        late_phase_method("rank-1", annealed_in_cycles, mask=rank_one_mask),
        late_phase_method("rank-1-10", annealed_in_cycles, 10, mask=rank_one_mask),
    )
}

COMPARISONS = {
    "late-phase-rank-one": dataclasses.replace(
        LATE_PHASE,
        task="cifar10-16-three-conv",
        methods=tuple(METHODS),
        make_task=functools.partial(make_task, model=ThreeConv(features=(16, 24, 24))),
        own_methods=METHODS,
        learning_rates=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    )
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
