"""Nowcasting in reinforcement learning: deep deterministic policy gradients on Gymnasium's Pendulum-v1, with Adam.

    python -m experiments.pendulum
    python -m experiments.pendulum --arms plain wnn drift --learning-rates 1e-3 --search-seeds None --num-steps 39000
        --target -200 --output runs/pendulum-published

Jang et al. (ICML 2023) report that a DDPG agent learns the pendulum 1.32 times as fast with WNN, 1.08 with
Introspection and 1.05 with a linear fit. Networks, memory, discount, noise and targets are those of their program; a
step is one of the environment (of which 1,000 come before, in the time of which nothing is learned) and one of the
actor and the critic, and the learning rate is the critic's, that of the actor a tenth of it. WNN jumps every fifth
episode, with a snapshot of both networks after each, as theirs; `drift-actor` and `drift-critic` have a drift of one of
the networks. 14,000 steps, or 70 episodes; every 500 of them, the actor acts without noise in 50 episodes of 200 steps
from states that are always the same. Every arm is at the best of five rates, by two seeds (10, 11) that are not among
the five reported (0 to 4).

**Of the arms, `plain` and `drift` alone have been run, at the four lower rates.** CPU, 2 cores; Python 3.11, jax
0.10.2, optax 0.2.8; scores are at the end, mean ± standard deviation.

Steps saved to the best return of `plain` with the same seed (-162.8 on the mean), with 95 % intervals:

| arm | rate | read from | steps saved % | reached | return | test return |
|---|---|---|---|---|---|---|
| plain | 0.008* | weights | 3 (0 to 9) | 5/5 | -172.9 ± 26.7 | -184.4 ± 21.2 |
| drift | 0.008* | EMA .998 | at most 3 (0 to 6) | 3/5 | -461.7 ± 536.4 | -482.6 ± 542.4 |

* at the edge of the grid, which has since got a fifth rate above it.

What this says. A drift of both networks saves nothing here, and one of its five runs at the rate that the search chose
did not learn to hold the pendulum up at all.
"""

from pathlib import Path
from typing import Any

import optax

import wnn_jax
from wnn_jax.meta.evaluation.arms import ademamix
from wnn_jax.meta.evaluation.comparison import Compare, main
from wnn_jax.meta.training.arm import Arm

ACTOR = {"actor": True, "critic": False}
CRITIC = {"actor": False, "critic": True}


def slower_actor(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, whose learning rate is the critic's, with a tenth of that for the actor."""
    return optax.chain(optimizer, optax.masked(optax.scale(0.1), ACTOR))


def adam(learning_rate: Any) -> optax.GradientTransformation:
    """What the arms train with, given the critic's learning rate."""
    return slower_actor(optax.adam(learning_rate))


def drift_of(name: str, part: dict[str, bool]) -> Arm:
    """An arm with a drift of one of the networks."""

    def optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        return optax.chain(adam(learning_rate), optax.masked(wnn_jax.nowcast("drift", num_steps=num_steps), part))

    return Arm(name, optimizer)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("ademamix-6", lambda rate, num_steps: slower_actor(ademamix(rate, num_steps, alpha=6))),
        drift_of("drift-actor", ACTOR),
        drift_of("drift-critic", CRITIC),
    )
}

CONFIG = Compare(
    task="pendulum-ddpg",
    arms=("plain", "wsd", "ademamix-6", "wnn", "drift", "drift-actor", "drift-critic"),
    learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    search_seeds=(10, 11),
    seeds=(0, 1, 2, 3, 4),
    num_steps=14_000,
    evaluate_every=500,
    # An episode.
    snapshot_every=200,
    output=Path("runs/pendulum"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, base=adam, arms=ARMS)
