"""Late-phase weights on a residual network, compared with annealed SGD, SWA and nowcasts.

    python -m experiments.late_phase --data-dir DIR

The record is `late_phase.md`. All methods take as many minibatches.
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
from wnn_jax.lab.comparing.comparison import main
from wnn_jax.lab.comparing.options import Comparison
from wnn_jax.lab.tasks import Task
from wnn_jax.lab.tasks.data import check_datasets, load_dataset
from wnn_jax.lab.tasks.data.datasets import arrays_digest, random_mirror
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums
from wnn_jax.lab.training.evaluation_weights import EvaluationWeights
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
        return jax.nn.softmax(self._logits(params, model_state, images))


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
        Method("annealed", annealed, is_baseline=True),
        Method(
            "swa",
            with_average,
            evaluation_weights={
                "SWA": EvaluationWeights(lambda params, state: averaging.uniform_eval_params(state, params))
            },
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
    check_datasets(("cifar10-16", "mnist-14"), data_dir)
    digits = load_dataset("mnist-14", data_dir)
    outliers = {
        split: np.pad(images[:NUM_OUTLIERS], [(0, 0), (1, 1), (1, 1), (0, 0)]).repeat(3, axis=-1)
        for split, images in (("validation", digits.validation.images), ("test", digits.test.images))
    }
    return Calibration(
        dataset=load_dataset("cifar10-16", data_dir),
        model=model,
        batch_size=BATCH_SIZE,
        augment=random_mirror,
        outliers=outliers,
    ).with_training_examples(slice(EPOCH * BATCH_SIZE))


LATE_PHASE = Comparison(
    task="cifar10-16-resnet",
    methods=tuple(METHODS),
    make_task=make_task,
    base=sgd,
    own_methods=METHODS,
    learning_rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    search_seeds=(10,),
    seeds=(0, 1, 2, 3, 4),
    num_steps=30 * EPOCH,
    evaluate_every=6 * EPOCH,
)

COMPARISONS = {"late-phase": LATE_PHASE}

if __name__ == "__main__":
    main(COMPARISONS, __doc__)
