"""Prediction of the next token of a text."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data.datasets import TextDataset, check_batch_size, consecutive_batches
from wnn_jax.lab.tasks.image_classification import accuracy_and_loss
from wnn_jax.lab.tasks.models import TransformerLM, describe_model
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

_MAX_EVALUATION_PIECES = 1_000


def perplexity(cross_entropy: float) -> float:
    """Return the exponential of a cross entropy in nats, or infinity where it overflows."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A network learns to predict the next token at every position of a text, by the cross entropy.

    Training batches are windows at random places of the training text. Evaluation uses consecutive pieces that do not
    overlap: the first 1,000 of a split at most, so that it costs less than some 30 steps.

    The model maps tokens `[n, length]` to logits `[n, length, vocab_size]`, without seeing what follows a position. It
    sees `context_length` tokens at once. A batch that is empty, or larger than the text, is a `UsageError`.
    """

    dataset: TextDataset
    model: nn.Module
    batch_size: int
    context_length: int

    def __post_init__(self) -> None:
        shortest = min(len(self.dataset.train), len(self.dataset.validation), len(self.dataset.test))
        longest = min(shortest - 1, getattr(self.model, "max_length", shortest))
        if not 1 <= self.context_length <= longest:
            raise UsageError(
                f"context_length={self.context_length} must be positive and at most {longest}, for this model and text."
            )
        check_batch_size(self.batch_size, len(self.dataset.train) - self.context_length)

    metrics = (
        Metric("perplexity", higher_is_better=False, from_mean=perplexity, format=".3f"),
        Metric("loss", higher_is_better=False),
        Metric("accuracy", higher_is_better=True, format=".2%"),
    )

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "language model",
            "dataset": {"name": self.dataset.name, "sha256": self.dataset.digest},
            "model": describe_model(self.model),
            "batch_size": self.batch_size,
            "context_length": self.context_length,
            "max_evaluation_pieces": _MAX_EVALUATION_PIECES,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        tokens = jnp.asarray(self.dataset.train[None, : self.context_length], jnp.int32)
        return self.model.init(key, tokens)["params"], {}

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        del key
        logits, targets = self._predict(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), model_state

    def batch(self, seed: int, step: int) -> Batch:
        num_windows = len(self.dataset.train) - self.context_length
        starts = np.random.default_rng([seed, step]).integers(num_windows, size=self.batch_size)
        return {"tokens": self.dataset.train[starts[:, None] + np.arange(self.context_length + 1)]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        # The last token of a piece is only predicted. It is also the first token of the next piece.
        tokens, length = getattr(self.dataset, split), self.context_length
        num_pieces = min((len(tokens) - 1) // length, _MAX_EVALUATION_PIECES)
        pieces = np.arange(num_pieces)[:, None] * length + np.arange(length + 1)
        return consecutive_batches({"tokens": tokens[pieces]}, 100)

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        del model_state
        sums = accuracy_and_loss(*self._predict(params, batch))
        return {"perplexity": sums["loss"], **sums}

    def _predict(self, params: Params, batch: Batch) -> tuple[Any, jax.Array]:
        """Return logits `[n, length, vocab_size]`, and the tokens to predict `[n, length]`."""
        tokens = jnp.asarray(batch["tokens"], jnp.int32)
        return self.model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]


def transformer_task(text: TextDataset) -> LanguageModel:
    """Make the task of a transformer of one layer that learns a text, in windows of 64 tokens."""
    model = TransformerLM(text.vocab_size, width=48, num_layers=1, max_length=64)
    return LanguageModel(dataset=text, model=model, batch_size=32, context_length=64)
