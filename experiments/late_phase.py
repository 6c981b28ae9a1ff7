"""Late-phase weights on CIFAR-10, beside plain SGD with as many minibatches.

@RECORD@
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from experiments.averaging import load
from experiments.harness.batch_norm import Lab, Options, run
from wnn_jax import averaging
from wnn_jax.late_phase import average_members, late_phase, migrate_state, norm_mask, select_member, split_members


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatePhaseOptions(Options):
    """Options of this experiment."""

    output: Path = Path("runs/late-phase")
    num_members: int = 5
    """Members of the late-phase weights."""


def arms(lab: Lab, seed: int, num_members: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains and scores every arm."""
    num_epochs = lab.options.num_epochs
    tx = lab.sgd(decayed=True)
    annealed = lab.train(lab.init(seed, tx), tx, seed, 0, num_epochs)
    yield "sgd, cosine", lab.scores(annealed.params, annealed.stats)
    for decayed in (True, False):
        first = 6 * num_epochs // 10
        tx = lab.sgd(decayed=decayed)
        early = lab.train(lab.init(seed, tx), tx, seed, 0, first)
        members = split_members(early.params, norm_mask, jax.random.key(seed), num_members=num_members)
        # As many minibatches, but the shared weights, and each member, take a step once a cycle.
        of_cycles = lab.sgd(decayed=decayed, cycles_from=first, cycle=num_members)
        late_tx: Any = late_phase(of_cycles, of_cycles, num_members)
        state = migrate_state(early.state, late_tx, members)
        stats = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_members, *leaf.shape)), early.stats)
        average: Any = averaging.uniform(0, lab.steps_per_epoch)
        average_state = average.init(members)

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2, 3))
        def step(members: Any, stats: Any, state: Any, average_state: Any, images: Any, labels: Any) -> Any:
            member = state.member
            own = jax.tree.map(lambda leaf: leaf[member], stats)
            gradient, new = jax.grad(lab.loss, has_aux=True)(select_member(members, member), own, images, labels)
            updates, state = late_tx.update(gradient, state, members)  # noqa: B023
            _, average_state = average.update(updates, average_state, members)  # noqa: B023
            stats = jax.tree.map(lambda leaf, value: leaf.at[member].set(value), stats, new)
            return optax.apply_updates(members, updates), stats, state, average_state

        for images, labels in lab.batches(seed, first, num_epochs - first):
            members, stats, state, average_state = step(members, stats, state, average_state, images, labels)
        if decayed:
            params, mean_stats = average_members(members, stats)
            yield f"late-phase, {num_members} members", lab.scores(params, mean_stats)
        else:
            params, _ = average_members(averaging.uniform_eval_params(average_state, members))
            yield "late-phase, swa", lab.scores(params, lab.with_new_stats(params, early.stats, seed))


if __name__ == "__main__":
    chosen_options = tyro.cli(LatePhaseOptions, prog="python -m experiments.late_phase", description=__doc__)
    run(
        chosen_options,
        Lab(load(chosen_options.data_dir), chosen_options),
        functools.partial(arms, num_members=chosen_options.num_members),
    )
