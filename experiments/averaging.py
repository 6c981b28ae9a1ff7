"""Averages of weights on CIFAR-10 at equal cost: SWA, LAWA, EMA, TWA, and TWA after nowcasts.

@RECORD@
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import wnn_jax
from experiments.harness.batch_norm import Lab, Options, Trained, run
from wnn_jax import averaging
from wnn_jax.meta.datasets import Dataset, Split, half_size, load_cifar10

_TWA_EPOCHS = 2
_EMA_DECAY = 0.998
_LAWA_SIZE = 3
_NUM_HELD_OUT = 4_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragingOptions(Options):
    """Options of this experiment."""

    output: Path = Path("runs/averaging")


def arms(lab: Lab, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains and scores every arm."""
    num_epochs = lab.options.num_epochs
    tx = lab.sgd(decayed=True)
    annealed = lab.train(lab.init(seed, tx), tx, seed, 0, num_epochs)
    yield "sgd, cosine", lab.scores(annealed.params, annealed.stats)

    # Averages over the second half, one checkpoint an epoch.
    first = num_epochs // 2
    period = lab.steps_per_epoch
    tx = optax.chain(
        lab.sgd(decayed=False),
        averaging.uniform(first * period, period),
        averaging.lawa(_LAWA_SIZE, period, first * period),
        averaging.ema(_EMA_DECAY),
    )
    checkpoints: dict[int, Any] = {}
    constant = lab.train(lab.init(seed, tx), tx, seed, 0, num_epochs, on_epoch=_keep(checkpoints))
    yield "sgd, constant", lab.scores(constant.params, constant.stats)
    for name, read in (
        ("swa", averaging.uniform_eval_params),
        (f"lawa-{_LAWA_SIZE}", averaging.lawa_eval_params),
        ("ema", averaging.ema_eval_params),
    ):
        yield name, _score_average(lab, read(constant.state, constant.params), constant, seed)

    # The last two epochs for the coefficients instead.
    yield "twa-t", _twa(lab, _chosen(checkpoints, num_epochs), constant, seed)
    yield "twa-t, conference", _twa(lab, _chosen(checkpoints, num_epochs), constant, seed, form="orthonormal")
    yield "twa-t, 4 bits", _twa(lab, _chosen(checkpoints, num_epochs), constant, seed, bits=4)

    # On images that the base run has not seen: it gets fewer.
    train = lab.dataset.train
    held_out = Split(train.inputs[:_NUM_HELD_OUT], train.targets[:_NUM_HELD_OUT])
    rest = Split(train.inputs[_NUM_HELD_OUT:], train.targets[_NUM_HELD_OUT:])
    tx = lab.sgd(decayed=False)
    checkpoints = {}
    base = lab.train(lab.init(seed, tx), tx, seed, 0, num_epochs - _TWA_EPOCHS, on_epoch=_keep(checkpoints), split=rest)
    yield "twa-v", _twa(lab, _chosen(checkpoints, num_epochs), base, seed, split=held_out)

    # Four snapshots an epoch, and so a jump every five quarters of an epoch.
    tx = optax.chain(
        lab.sgd(decayed=False),
        wnn_jax.nowcast(snapshot_every=period // 4, stop=(num_epochs - _TWA_EPOCHS) * period - period // 2),
    )
    checkpoints = {}
    jumped = lab.train(lab.init(seed, tx), tx, seed, 0, num_epochs, on_epoch=_keep(checkpoints))
    yield "nowcast", lab.scores(jumped.params, jumped.stats)
    yield "nowcast, twa-t", _twa(lab, _chosen(checkpoints, num_epochs), jumped, seed)


def _keep(checkpoints: dict[int, Any]) -> Any:
    def keep(epoch: int, trained: Trained) -> None:
        checkpoints[epoch] = jax.device_get(trained.params)

    return keep


def _chosen(checkpoints: dict[int, Any], num_epochs: int) -> list[Any]:
    """Those of the second half, without the epochs that the coefficients have."""
    return [checkpoints[epoch] for epoch in range(num_epochs // 2 - 1, num_epochs - _TWA_EPOCHS)]


def _score_average(lab: Lab, params: Any, base: Trained, seed: int, split: Split | None = None) -> dict[str, float]:
    return lab.scores(params, lab.with_new_stats(params, base.stats, seed, split))


def _twa(lab: Lab, checkpoints: list[Any], base: Trained, seed: int, **options: Any) -> dict[str, float]:
    """Trains coefficients for two epochs."""
    split = options.pop("split", None)
    subspace = averaging.make_subspace(checkpoints, **options)
    num_steps = _TWA_EPOCHS * lab.steps_per_epoch
    # Coefficients are of directions of norm 1, for which weights of norms about 1 to 10 are the scale.
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.02, num_steps // 5, num_steps), weight_decay=0.0)
    coefficients = averaging.init_coefficients(subspace)
    state = tx.init(coefficients)
    stats = base.stats

    @jax.jit
    def step(coefficients: Any, stats: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(coefficients: Any) -> Any:
            return lab.loss(averaging.combine(subspace, coefficients), stats, images, labels)

        gradient, stats = jax.grad(loss, has_aux=True)(coefficients)
        updates, state = tx.update(gradient, state, coefficients)
        return optax.apply_updates(coefficients, updates), stats, state

    first = lab.options.num_epochs - _TWA_EPOCHS
    for images, labels in lab.batches(seed, first, _TWA_EPOCHS, split):
        coefficients, stats, state = step(coefficients, stats, state, images, labels)
    params = averaging.combine(subspace, coefficients)
    return _score_average(lab, params, base, seed)


def load(data_dir: Path) -> Dataset:
    """CIFAR-10 at 16x16."""
    return half_size(load_cifar10(data_dir))


if __name__ == "__main__":
    chosen_options = tyro.cli(AveragingOptions, prog="python -m experiments.averaging", description=__doc__)
    run(chosen_options, Lab(load(chosen_options.data_dir), chosen_options), arms)
