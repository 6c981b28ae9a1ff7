"""Reinforcement learning: DDPG on the pendulum, with nowcasts of the actor, of the critic, and of both.

    python -m experiments.pendulum

The record is `pendulum.md`. `published` follows the protocol of WNN's paper.
"""

import dataclasses
from typing import Any

import optax

import wnn_jax
from wnn_jax._store import fingerprint
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import ademamix

ACTOR = {"actor": True, "critic": False}
CRITIC = {"actor": False, "critic": True}
# Steps of an episode, and between the snapshots of a window.
EPISODE = 200


def slower_actor(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Give the actor a tenth of the critic's learning rate."""
    return optax.chain(optimizer, optax.masked(optax.scale(0.1), ACTOR))


def adam(learning_rate: Any) -> optax.GradientTransformation:
    """Return the optimizer of the methods, given the critic's learning rate."""
    return slower_actor(optax.adam(learning_rate))


def nowcast_of(part: dict[str, bool], name: str, nowcaster: str, **settings: Any) -> Method:
    """Return a method with a nowcaster of one of the two networks."""

    def optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        nowcast = wnn_jax.nowcast(nowcaster, num_steps=num_steps, **settings)
        return optax.chain(adam(learning_rate), optax.masked(nowcast, part))

    return Method(name, optimizer, {"nowcaster": fingerprint(wnn_jax.load(nowcaster)), **settings})


METHODS = {
    method.name: method
    for method in (
        Method("ademamix-6", lambda rate, num_steps: slower_actor(ademamix(rate, num_steps, alpha=6))),
        nowcast_of(ACTOR, "drift-actor", "drift"),
        nowcast_of(CRITIC, "drift-critic", "drift"),
        nowcast_of(ACTOR, "wnn-actor", "wnn", snapshot_every=EPISODE),
        nowcast_of(CRITIC, "wnn-critic", "wnn", snapshot_every=EPISODE),
    )
}

PENDULUM = Comparison(
    task="pendulum-ddpg",
    methods=("plain", "wsd", "ademamix-6", "wnn", "drift", "drift-actor", "drift-critic"),
    base=adam,
    own_methods=METHODS,
    learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    search_seeds=(10, 11, 12, 13, 14),
    seeds=(20, 21, 22, 23, 24),
    num_steps=14_000,
    evaluate_every=500,
    snapshot_every=EPISODE,
)

COMPARISONS = {
    "pendulum": PENDULUM,
    "published": dataclasses.replace(
        PENDULUM,
        methods=("plain", "wnn", "wnn-actor", "wnn-critic", "introspection", "linear", "drift"),
        recorded=("introspection",),
        learning_rates=(1e-3,),
        search_seeds=None,
        seeds=(0, 1, 2, 3, 4),
        num_steps=39_000,
        target=-200.0,
        evaluation_weights="weights",
    ),
    "low-rate": dataclasses.replace(
        PENDULUM,
        methods=("plain", "wnn", "ademamix-6", "drift", "drift-actor", "drift-critic"),
        learning_rates=(1e-3,),
        search_seeds=None,
        seeds=(0, 1, 2, 3, 4),
    ),
}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
