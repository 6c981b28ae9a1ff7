"""Late-phase weights of rank 1, on a recurrent network that predicts the characters of tiny_shakespeare.

    python -m experiments.late_phase_lstm --data-dir DIR

In the place of the paper's LSTM on enwik8, which takes more than minutes: one layer of 64 units, 64 characters at a
time, Adam at a rate that decays to 0 by a cosine, 2,000 minibatches of 32. From 60 % of the training on every kernel,
those of the recurrence included, has factors of its inputs and outputs, which begin at 1: one of each in
`rank-1-alone`, 5 members in `rank-1`. Adam divides by the size of gradients: to sum those of a cycle does not make up
for the steps that shared weights do not take, as it does with SGD.

The paper (von Oswald et al., ICLR 2021), bits per character on enwik8, of an LSTM:

| | plain | late-phase |
|---|---|---|
| enwik8 | 1.695 | 1.633 |

CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 3 seeds; the results are in `results/late-phase-lstm/`. All arms
are at 0.03, inside the grid, and read from the weights. Perplexity of a character at the end, mean ± standard
deviation:

| arm | validation | test | bits per character, test |
|---|---|---|---|
| annealed | 5.548 ± 0.073 | 6.186 ± 0.084 | 2.629 |
| rank-1-alone | 5.546 ± 0.071 | 6.256 ± 0.072 | 2.645 |
| rank-1, 5 members | 5.574 ± 0.080 | 6.235 ± 0.081 | 2.640 |

What this says. The gain of the paper is not confirmed on this small network: all three are level, within the noise of 3
seeds and in the three searches (seed 10: 5.469, 5.500 and 5.499).
"""

from pathlib import Path

import optax

from experiments.late_phase import begun_by, in_cycles, late_phase_arm
from wnn_jax.late_phase import rank_one_mask
from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.meta.training.arm import Arm


def adam_in_cycles(learning_rate: float, num_steps: int, first_cycle: int, cycle: int) -> optax.GradientTransformation:
    """Adam, whose rate decays to 0 by a cosine of the minibatches."""
    return optax.adam(in_cycles(optax.cosine_decay_schedule(learning_rate, num_steps), first_cycle, cycle))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("annealed", begun_by(adam_in_cycles), is_plain=True),
        late_phase_arm("rank-1-alone", adam_in_cycles, 1, mask=rank_one_mask),
        late_phase_arm("rank-1", adam_in_cycles, mask=rank_one_mask),
    )
}

CONFIG = Compare(
    task="shakespeare-lstm",
    arms=tuple(ARMS),
    learning_rates=(3e-3, 1e-2, 3e-2, 6e-2),
    search_seeds=(10,),
    num_steps=2_000,
    evaluate_every=400,
    output=Path("runs/late-phase-lstm"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, arms=ARMS)
