"""Late-phase weights on CIFAR-10, beside plain SGD, SWA and nowcasts with as many minibatches.

    python -m experiments.late_phase --data-dir DIR

A ResNet with batch normalisation (8-16-32 features, one block per stage, a stem of stride 2) on images of 16x16,
mirrored at random, of which there are 7,680: an epoch is 60 minibatches of 128, and every method takes 30 epochs. The
optimizer is that of `experiments/averaging.py`. From 60 % of the training on (as in the paper, epoch 120 of 200) some
weights exist several times, without noise between them; gradients of shared weights are summed, and rates go by
minibatches in all methods.

- `late-phase`: 5 members of the scales and shifts of all batch normalisation; `late-phase-10`: 10;
  `late-phase-last-layer`: 5 of the classifier; `late-phase-10-both`: 10 of both, as in the paper's table.
- `late-phase-swa`: the first, at a constant rate, with the members averaged once an epoch; `swa`: one network averaged
  in the same way.
- `late-phase-ensemble`: the first again, read also as the mean prediction of its members, which is as many evaluations
  of the network.
- `drift`: annealed SGD with `wnn_jax.nowcast()`; `drift-late-phase`: the same under late-phase weights, where shared
  weights and each member's own have a drift each.

`loss` is the negative log-likelihood. The calibration error has 15 bins; the outliers are 2,000 digits of MNIST, put
into images of the same size, which the largest probability is to tell from CIFAR's. Rates are chosen on a seed of their
own, everything on the validation split.

The paper (von Oswald et al., ICLR 2021, test accuracy on CIFAR-10 in %): WRN 28-10, 200 epochs, 10 members of batch
normalisation and the last layer.

| | plain | late-phase |
|---|---|---|
| SGD | 96.16 | 96.46 |
| SWA | 96.48 | 96.81 |

CPU, 2 cores; Python 3.11, jax 0.10.2, optax 0.2.8; 5 seeds; the results are in `results/late-phase/`. Every method is at
the best of six rates. Mean ± standard deviation at the end, on the test split; the reading is the one that is best on
the validation split, of accuracy, and of `late-phase-ensemble`, whose weights are those of `late-phase`, the ensemble:

| method | rate | read from | accuracy % | negative log-likelihood | calibration error | AUROC of outliers |
|---|---|---|---|---|---|---|
| annealed | 0.8 | EMA .998 | 54.94 ± 0.69 | 1.327 ± 0.011 | 0.116 ± 0.003 | **0.776** ± 0.026 |
| swa | 0.8 | EMA .99 | 55.01 ± 0.30 | **1.254** ± 0.012 | **0.040** ± 0.003 | 0.774 ± 0.029 |
| | | SWA | 54.55 ± 0.49 | **1.267** ± 0.015 | **0.039** ± 0.006 | 0.774 ± 0.035 |
| late-phase | 1.6* | EMA .998 | 54.93 ± 0.52 | 1.311 ± 0.009 | 0.098 ± 0.003 | 0.771 ± 0.017 |
| late-phase-10 | 0.4 | EMA .998 | 52.24 ± 1.88 | 1.407 ± 0.044 | 0.113 ± 0.040 | 0.755 ± 0.029 |
| late-phase-last-layer | 1.6* | EMA .998 | 55.23 ± 0.14 | 1.307 ± 0.008 | 0.098 ± 0.002 | 0.757 ± 0.050 |
| late-phase-10-both | 0.8 | weights | 53.48 ± 1.30 | 1.330 ± 0.019 | 0.070 ± 0.016 | 0.714 ± 0.062 |
| late-phase-swa | 0.8 | EMA .998 | 55.19 ± 0.68 | 1.289 ± 0.011 | 0.084 ± 0.004 | 0.746 ± 0.015 |
| late-phase-ensemble | 1.6* | ensemble | 54.49 ± 0.55 | 1.343 ± 0.012 | 0.111 ± 0.002 | 0.741 ± 0.014 |
| drift | 0.4 | EMA .998 | **55.67** ± 1.16 | 1.413 ± 0.040 | 0.159 ± 0.006 | 0.664 ± 0.046 |
| drift-late-phase | 0.8 | EMA .998 | 54.74 ± 0.72 | 1.391 ± 0.026 | 0.144 ± 0.004 | 0.734 ± 0.030 |

* the highest rate that was run. The weights themselves have 53.96 ± 0.38 % and a log-likelihood of 1.416 in `annealed`,
54.49 ± 0.54 % and 1.349 in `late-phase`; at 0.8 that has 53.92 ± 0.42 % and 1.427. In the search `late-phase-10` is as
good at 1.6 as at 0.4; there it has 51.91 ± 1.11 %, a log-likelihood of 1.359 and a calibration error of 0.053.

Accuracy on the validation split of seed 10, by which rates are chosen, best reading:

| method | 0.05 | 0.1 | 0.2 | 0.4 | 0.8 | 1.6 |
|---|---|---|---|---|---|---|
| annealed | 50.85 | 52.00 | 53.85 | 54.23 | 55.95 | 54.93 |
| swa | 51.70 | 52.12 | 53.15 | 54.23 | 54.87 | 52.68 |
| late-phase | 50.38 | 51.70 | 52.42 | 53.80 | 55.02 | 55.40 |
| late-phase-10 | 50.70 | 51.35 | 52.23 | 53.73 | 52.52 | 53.73 |
| late-phase-ensemble | 50.78 | 51.20 | 51.80 | 53.80 | 55.02 | 55.40 |
| late-phase-last-layer | 50.98 | 51.15 | 51.62 | 53.62 | 54.80 | 55.07 |
| late-phase-10-both | 50.98 | 50.38 | 51.82 | 52.65 | 54.85 | 54.67 |
| late-phase-swa | 51.85 | 51.55 | 53.37 | 54.97 | 55.97 | 52.85 |
| drift | 52.75 | 52.42 | 54.47 | 55.23 | 55.20 | 54.37 |
| drift-late-phase | 51.45 | 50.90 | 53.05 | 53.80 | 55.27 | 53.40 |

What this says. **The gain of late-phase weights is not confirmed** at this length and size, in any form. At their own
best rates 5 members, those of the last layer, averaged, and as an ensemble are within the noise as accurate as annealed
SGD, at a rate that is twice as high. Their log-likelihood and calibration are a little better than its own, which is
the rate's doing: read from the EMA of .998, on the validation split, with seed 10 at 1.6, annealed SGD has 1.282 and
.080, late-phase weights 1.312 and .077; at 0.8 it has 1.312 and .102, they 1.366 and .122. Ten members are one to three
points less accurate, those of the classifier too, which is the paper's recipe, included. It is where they begin that
they lose: the EMA of .99 of `late-phase-10-both` has 55.0 % on the validation split there, after 18 epochs, and 52.3 %
after 24, of `late-phase-10` at 1.6 53.7 and 50.1 %, and the training loss of that goes up, from 1.40 to 1.51, where it
falls with 5 members and without any: the shared weights then take one step with the sum of ten gradients in the place
of ten steps, which so small a network bears badly (see `experiments/late_phase_rank_one.py`). What gains is an average
of the weights at a constant rate, in likelihood and calibration: SWA has a third of the calibration error of annealed
SGD, and late-phase weights beneath the same average take a part of that away again. At low rates the validation
accuracy falls from where late-phase weights begin also with 5 members: the network overfits its 7,680 images, the more
the lower the rate gets. The paper has a larger network on all images.

The drift reaches the best accuracy, within the noise of five seeds, and overfits the most: with it the likelihood, the
calibration and the AUROC of outliers are worse than without. Under late-phase weights it gains nothing. So nowcasting
is no way to calibrated networks where the data is little.

The program before this one found the same after 8 epochs of 359 minibatches on all images, 3 seeds: 68.33 ± 0.23 %
(SGD), 67.97 ± 0.32 (5 members), 66.90 ± 0.09 (with SWA) on the test images.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from experiments.averaging import annealed, sgd, warmed_up
from wnn_jax import averaging
from wnn_jax.lab.comparing.comparison import Compare, main
from wnn_jax.lab.tasks import Task, check_data
from wnn_jax.lab.tasks.data import load_images, random_mirror
from wnn_jax.lab.tasks.data.digest import arrays_digest
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums
from wnn_jax.lab.training.evaluation_weights import Reading
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainMembers
from wnn_jax.late_phase import SplitParams, ensemble_predict, module_mask, norm_mask

FIRST = 0.6
EPOCH = 60
BATCH_SIZE = 128
NUM_OUTLIERS = 2_000
MODEL = ResNet(features=(8, 16, 32), stem_strides=2)


def calibration_error(probabilities: jax.Array, labels: jax.Array, num_bins: int = 15) -> jax.Array:
    """Returns how far confidence is from accuracy, on average (Guo et al., ICML 2017, equation 3).

    Args:
      probabilities: `[n, num_classes]`.
      labels: `[n]` int.
      num_bins: number of equal intervals of the confidence. In each, its mean is compared with the accuracy.
    """
    confidence = probabilities.max(axis=-1)
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    is_right = probabilities.argmax(axis=-1) == labels
    gaps = jax.ops.segment_sum(is_right - confidence, bins, num_segments=num_bins)
    return jnp.abs(gaps).sum() / labels.size


def outlier_auroc(confidence: jax.Array, outlier_confidence: jax.Array) -> jax.Array:
    """Returns the share of pairs in which the outlier has the lower confidence (Hendrycks, Gimpel, ICLR 2017).

    This is the area under the ROC curve: 0.5 by chance, 1 at best. Ties count half.
    """
    ordered = jnp.sort(outlier_confidence)
    lower, not_higher = (jnp.searchsorted(ordered, confidence, side=side) for side in ("left", "right"))
    return (lower + not_higher).mean() / 2 / outlier_confidence.size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration(ImageClassification):
    """A classification of images that also measures probabilities, of one network or of an ensemble (`SplitParams`).

    Attributes:
      outliers: split -> images `[n, height, width, channels]` uint8 of things that the network has not learned.
    """

    outliers: Mapping[str, np.ndarray]
    measures_ensembles = True

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, negative log-likelihood (`loss`), expected calibration error, and detection of outliers."""
        return (
            *super().metrics,
            Metric("calibration error", higher_is_better=False),
            Metric("outlier AUROC", higher_is_better=True),
        )

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        digest = arrays_digest(*(self.outliers[split] for split in sorted(self.outliers)))
        return {**super().describe(), "kind": "calibration", "outliers": digest}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """A whole split with its outliers as one batch, because these metrics are no sums over examples."""
        images, labels = getattr(self.dataset, split)
        yield {"images": images, "labels": labels, "outliers": self.outliers[split]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The metrics of a split, with running batch statistics, each weighted by the number of its examples."""
        probabilities, outlier_probabilities = (
            ensemble_predict(self._predict, params, batch[name], model_state)
            if isinstance(params, SplitParams)
            else self._predict(params, batch[name], model_state)
            for name in ("images", "outliers")
        )
        logits = jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny))
        count = jnp.float32(len(batch["labels"]))
        auroc = outlier_auroc(probabilities.max(axis=-1), outlier_probabilities.max(axis=-1))
        return {
            **self._sums(logits, batch["labels"]),
            "calibration error": (count * calibration_error(probabilities, batch["labels"]), count),
            "outlier AUROC": (count * auroc, count),
        }

    def _predict(self, params: Params, images: jax.Array, model_state: ModelState) -> jax.Array:
        images = self.dataset.preprocess(images)
        logits: Any = self.model.apply({"params": params, **model_state}, images, **self._mode(train=False))
        return jax.nn.softmax(logits)


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


def drifting_in_cycles(
    learning_rate: float, num_steps: int, first_cycle: int, cycle: int
) -> optax.GradientTransformation:
    """As `annealed_in_cycles`, followed by the drift: of shared weights, and of each member's own."""
    return optax.chain(annealed_in_cycles(learning_rate, num_steps, first_cycle, cycle), wnn_jax.nowcast())


def begun_by(in_cycles: Any) -> Any:
    """The optimizer of the stage before, of which every step is a minibatch."""
    return lambda learning_rate, num_steps: in_cycles(learning_rate, num_steps, num_steps, 1)


def with_average(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """At a constant rate, averaged once an epoch from where late-phase weights begin."""
    average = averaging.uniform(round(FIRST * num_steps), EPOCH)
    return optax.chain(sgd(warmed_up(learning_rate, num_steps)), average)


def last_layer(params: Any) -> Any:
    """The mask of the classifier."""
    return module_mask(params, "Dense_0")


def norms_and_last_layer(params: Any) -> Any:
    """The mask of all batch normalisation and of the classifier."""
    return jax.tree.map(operator.or_, norm_mask(params), last_layer(params))


def late_phase_method(name: str, optimizer: Any, num_members: int = 5, **options: Any) -> Method:
    """A method with late-phase weights."""
    return Method(name, begun_by(optimizer), stages=(TrainMembers(optimizer, FIRST, num_members, **options),))


METHODS = {
    method.name: method
    for method in (
        Method("annealed", annealed, is_plain=True),
        Method(
            "swa",
            with_average,
            readings={"SWA": Reading(lambda params, state: averaging.uniform_eval_params(state, params))},
        ),
        late_phase_method("late-phase", annealed_in_cycles),
        late_phase_method("late-phase-10", annealed_in_cycles, 10),
        late_phase_method("late-phase-last-layer", annealed_in_cycles, mask=last_layer),
        late_phase_method("late-phase-10-both", annealed_in_cycles, 10, mask=norms_and_last_layer),
        late_phase_method("late-phase-swa", constant_in_cycles, average_every=EPOCH),
        late_phase_method("late-phase-ensemble", annealed_in_cycles, ensemble=True),
        Method("drift", begun_by(drifting_in_cycles)),
        late_phase_method("drift-late-phase", drifting_in_cycles),
    )
}


def make_task(data_dir: Path, model: nn.Module = MODEL) -> Task:
    """CIFAR-10 at 16x16 with so few images that an epoch has 60 minibatches; outliers are MNIST's digits."""
    check_data(("cifar10-16", "mnist-14"), data_dir)
    digits = load_images("mnist-14", data_dir)
    outliers = {
        split: np.pad(images[:NUM_OUTLIERS], [(0, 0), (1, 1), (1, 1), (0, 0)]).repeat(3, axis=-1)
        for split, images in (("validation", digits.validation.images), ("test", digits.test.images))
    }
    return Calibration.load(
        data_dir,
        dataset="cifar10-16",
        model=model,
        batch_size=BATCH_SIZE,
        augment=random_mirror,
        outliers=outliers,
    ).with_training_examples(slice(EPOCH * BATCH_SIZE))


CONFIG = Compare(
    task="cifar10-16-resnet",
    methods=tuple(METHODS),
    optimizer="sgd",
    learning_rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    search_seeds=(10,),
    seeds=(0, 1, 2, 3, 4),
    num_steps=30 * EPOCH,
    evaluate_every=6 * EPOCH,
    output=Path("runs/late-phase"),
)

if __name__ == "__main__":
    main(CONFIG, __doc__, make_task=make_task, base=sgd, methods=METHODS)
