"""Drifts beneath averages of weights and late-phase weights, in one table: what is gained by both together.

    python -m experiments.together --data-dir DIR

Task, length and optimizer are those of `experiments/averaging.py`, and so are all arms but the last two.
"""

import dataclasses
from pathlib import Path

from experiments import averaging
from experiments.averaging import ADAM_RATES, CONSTANT_RATES, make_task, sgd
from experiments.late_phase import annealed_in_cycles, drifting_in_cycles, late_phase_arm
from wnn_jax.meta.evaluation.comparison import main

ARMS = {
    **{name: averaging.ARMS[name] for name in ("annealed", "averages", "drift", "twa-adam", "drift-twa")},
    "late-phase": late_phase_arm("late-phase", annealed_in_cycles),
    "drift-late-phase": late_phase_arm("drift-late-phase", drifting_in_cycles),
}

CONFIG = dataclasses.replace(
    averaging.CONFIG,
    arms=tuple(ARMS),
    own_rates={
        **dict.fromkeys(("averages", "drift"), CONSTANT_RATES),
        **dict.fromkeys(("twa-adam", "drift-twa"), ADAM_RATES),
        "late-phase": (0.2, 0.4, 0.8, 1.6),
    },
    output=Path("runs/together"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, make_task=make_task, base=sgd, arms=ARMS)
