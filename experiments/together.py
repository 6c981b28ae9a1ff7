"""Averages and late-phase weights of one length, each without and with a drift beneath.

    python -m experiments.together --data-dir DIR

The record is `together.md`.
"""

import dataclasses

from experiments import averaging, late_phase
from wnn_jax.lab.comparing.comparison import main

LATE_PHASE = ("late-phase", "drift-late-phase")
METHODS = {
    **{name: averaging.METHODS[name] for name in ("annealed", "averages", "drift", "twa-adam", "drift-twa")},
    **{name: late_phase.METHODS[name] for name in LATE_PHASE},
}

COMPARISONS = {
    "together": dataclasses.replace(
        averaging.AVERAGING,
        methods=tuple(METHODS),
        own_methods=METHODS,
        own_rates={**averaging.AVERAGING.own_rates, **dict.fromkeys(LATE_PHASE, (0.1, 0.2, 0.4, 0.8, 1.6))},
    )
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
