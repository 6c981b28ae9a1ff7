"""Averages of weights on CIFAR-10 at equal cost: SWA, LAWA, EMA, TWA, and TWA after nowcasts.

    python -m experiments.averaging --data-dir DIR --output runs/averaging

A ResNet with batch normalisation (8-16-32 features, one block per stage) on images of 16x16, mirrored at random. SGD
with Nesterov momentum 0.9, batches of 128, weight decay 5e-4. Every arm may take 8 epochs of 359 steps in all. `sgd,
cosine` decays from 0.1 to 0; everything else is of runs at a constant 0.05. SWA, LAWA and EMA average the second half
(LAWA the latest 3 epochs, EMA with 0.998 per step). TWA has 6 epochs of such a run, the checkpoints after its epochs
4, 5 and 6, and 2 epochs for their coefficients: on the training images (`twa-t`), or on 4,000 that were taken from
the training images and that the run did not see (`twa-v`). The nowcaster is the default, 4 snapshots an epoch.
Averages have their batch statistics estimated anew on one more epoch, forward only. CPU, 2 cores; Python 3.11, jax
0.10.2, optax 0.2.8; 3 seeds, about 6 minutes each. Accuracies in %, mean ± std. The results are in
`results/averaging/`.

| arm | validation | test |
|---|---|---|
| sgd, cosine | 67.95 ± 0.10 | 68.33 ± 0.23 |
| sgd, constant | 59.41 ± 1.62 | 60.07 ± 1.43 |
| swa | 66.44 ± 0.43 | 67.06 ± 0.22 |
| lawa-3 | 66.51 ± 0.10 | 67.14 ± 0.15 |
| ema | 67.52 ± 0.39 | 67.88 ± 0.50 |
| twa-t | 65.22 ± 0.93 | 66.15 ± 0.06 |
| twa-t, conference | 65.11 ± 1.04 | 65.83 ± 0.57 |
| twa-t, 4 bits | 65.28 ± 1.04 | 66.09 ± 0.13 |
| twa-v | 64.68 ± 0.22 | 65.16 ± 0.67 |
| nowcast | 61.24 ± 4.89 | 61.62 ± 3.35 |
| nowcast, twa-t | 65.29 ± 0.53 | 66.28 ± 0.26 |

What this says. Every average is far above the run that it averages, and annealing is above every average: 68.3 %
against 67.9 (EMA), 67.1 (LAWA), 67.1 (SWA). That TWA is better than SWA is not confirmed at equal cost: 2 of 8 epochs
for the coefficients of 3 checkpoints are worth less than as epochs of the run (66.2 against 67.1). Four bits lose
nothing that 3 seeds could show, and the form of the conference is no better. On held-out images (`twa-v`) it is
worst, having fewer images for both parts. TWA adds much to a run with nowcasts (61.6 to 66.3), as to one without
(60.1); nowcasts add to TWA no more than the noise (66.3 ± 0.3 against 66.2 ± 0.1), and by themselves, at this noisy
constant rate, nothing that 3 seeds could show. All this is of short trainings, far from converged, with one untuned
rate for the coefficients (0.02); the papers average runs that have converged.
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
_MIN_EPOCHS = 5
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
    if num_epochs < _MIN_EPOCHS:
        raise ValueError(f"num_epochs={num_epochs} must be at least {_MIN_EPOCHS}, or TWA has less than 2 checkpoints.")
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
    summary = (__doc__ or "").partition("\n\n")[0]
    chosen_options = tyro.cli(AveragingOptions, prog="python -m experiments.averaging", description=summary)
    run(chosen_options, Lab(load(chosen_options.data_dir), chosen_options), arms)
