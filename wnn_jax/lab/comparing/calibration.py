"""How far the probabilities of a classifier can be trusted, of one network and of an ensemble."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax.lab.tasks.data import arrays_digest
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums
from wnn_jax.late_phase import SplitParams, ensemble_predict


def expected_calibration_error(probabilities: jax.Array, labels: jax.Array, num_bins: int = 15) -> jax.Array:
    """How far the probability of the predicted class is from the share of right predictions, on average.

    Args:
      probabilities: `[n, num_classes]`.
      labels: `[n]` int.
      num_bins: the probability of the predicted class is divided into so many equal parts, in each of which its mean is
        compared with the share of right predictions. Parts count by the examples in them.

    Returns:
      A scalar from 0 to 1, lower is better.

    References:
      Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, ICML 2017, equation 3
    """
    confidence = probabilities.max(axis=-1)
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    is_right = probabilities.argmax(axis=-1) == labels
    gaps = jax.ops.segment_sum(is_right - confidence, bins, num_segments=num_bins)
    return jnp.abs(gaps).sum() / labels.size


def outlier_auroc(confidence: jax.Array, outlier_confidence: jax.Array) -> jax.Array:
    """The area under the receiver operating characteristic of telling outliers by their lower confidence.

    It is the share of pairs of an ordinary example and an outlier in which the outlier has the lower one; ties count
    half.

    Args:
      confidence: of ordinary examples, `[n]`, such as the largest probability.
      outlier_confidence: of the others, `[m]`.

    Returns:
      A scalar: 0.5 by chance, 1 at best.

    References:
      Hendrycks, Gimpel, `A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks
      <https://arxiv.org/abs/1610.02136>`_, ICLR 2017
    """
    ordered = jnp.sort(outlier_confidence)
    lower, not_higher = (jnp.searchsorted(ordered, confidence, side=side) for side in ("left", "right"))
    return (lower + not_higher).mean() / 2 / outlier_confidence.size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration(ImageClassification):
    """A classification of images that is judged by its probabilities, too.

    What is measured may be one network, or an ensemble of late-phase weights: `SplitParams`, with the model states of
    all members.

    Attributes:
      outliers: split -> images `[n, height, width, channels]` uint8 of nothing that the network has learned, which are
        to be told from those of the split.
    """

    outliers: Mapping[str, np.ndarray]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy and negative log-likelihood (`loss`), expected calibration error, and detection of outliers."""
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
        """A whole split as one batch, because no sum over examples makes these metrics; with its outliers."""
        images, labels = getattr(self.dataset, split)
        yield {"images": images, "labels": labels, "outliers": self.outliers[split]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The metrics of a split, with running batch statistics, each weighted by the number of its examples."""
        probabilities, of_outliers = (
            ensemble_predict(self._predict, params, images, model_state)
            if isinstance(params, SplitParams)
            else self._predict(params, images, model_state)
            for images in (batch["images"], batch["outliers"])
        )
        logits = jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny))
        count = jnp.float32(len(batch["labels"]))
        return {
            **self._sums(logits, batch["labels"]),
            "calibration error": (count * expected_calibration_error(probabilities, batch["labels"]), count),
            "outlier AUROC": (count * outlier_auroc(probabilities.max(axis=-1), of_outliers.max(axis=-1)), count),
        }

    def _predict(self, params: Params, images: jax.Array, model_state: ModelState) -> jax.Array:
        """Probabilities `[n, num_classes]`."""
        images = self.dataset.preprocess(images)
        logits: Any = self.model.apply({"params": params, **model_state}, images, **self._mode(train=False))
        return jax.nn.softmax(logits)
