"""Late-phase weights on CIFAR-10, beside plain SGD with as many minibatches.

    python -m experiments.late_phase --data-dir DIR

Network, images and optimizer of `experiments/averaging.py`; every arm takes 8 epochs of 359 minibatches. Late-phase
weights are the scales and shifts of all batch normalisation, 5 members from the middle on, without noise; gradients of
shared weights are summed. `late-phase-swa` averages the members' weights once an epoch at a constant rate, with batch
statistics estimated anew.

**The table below is of the program that came before this one, and was not run again**; what is different is in
`experiments/averaging.py`. CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 3 seeds. Accuracies in %, mean ± std.
The results are in `results/late-phase/`.

| arm | validation | test |
|---|---|---|
| sgd, cosine | 67.95 ± 0.10 | 68.33 ± 0.23 |
| late-phase, 5 members | 67.54 ± 0.19 | 67.97 ± 0.32 |
| late-phase, swa | 66.23 ± 0.22 | 66.90 ± 0.09 |

What this says. At equal minibatches late-phase weights are as good as plain SGD within the noise, or a little worse,
and with SWA as good as SWA alone (67.1 in `experiments/averaging.py`). The gain of the paper, 0.3 points on a large
network after 200 epochs, could not show here; perhaps in a training this short the shared weights miss the steps, of
which they take a fifth as many in the last four epochs.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from experiments.averaging import annealed, sgd, warmed_up
from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.meta.evaluation.stages import TrainMembers
from wnn_jax.meta.training.arm import Arm

NUM_MEMBERS = 5
FIRST = 0.5


def in_cycles(schedule: Any, first_cycle: int, cycle: int) -> Any:
    """A schedule for an optimizer that from `first_cycle` on takes one step in `cycle` minibatches."""
    return lambda count: schedule(count + (cycle - 1) * jnp.maximum(count - first_cycle, 0))


def annealed_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `annealed`, by minibatches."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 8, num_steps)
    return sgd(in_cycles(schedule, first_cycle, cycle))


def constant_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `constant`, by minibatches."""
    return sgd(in_cycles(warmed_up(learning_rate, num_steps), first_cycle, cycle))


def begun_by(in_cycles: Any) -> Any:
    """The optimizer of the stage before, of which every step is a minibatch."""
    return lambda learning_rate, num_steps: in_cycles(learning_rate, num_steps, num_steps, 1)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("annealed", annealed, is_plain=True),
        Arm(
            "late-phase",
            begun_by(annealed_in_cycles),
            stages=(TrainMembers(annealed_in_cycles, FIRST, NUM_MEMBERS),),
        ),
        Arm(
            "late-phase-swa",
            begun_by(constant_in_cycles),
            stages=(TrainMembers(constant_in_cycles, FIRST, NUM_MEMBERS, average_every=359),),
        ),
    )
}

CONFIG = Compare(
    task="cifar10-16-resnet",
    arms=tuple(ARMS),
    learning_rates=(0.05, 0.1, 0.2),
    search_seeds=(10,),
    num_steps=8 * 359,
    evaluate_every=359,
    output=Path("runs/late-phase"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, base=sgd, arms=ARMS)
