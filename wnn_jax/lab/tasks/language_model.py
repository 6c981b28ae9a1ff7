"""Prediction of the next token of a text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import TextDataset, check_batch_size, load_text
from wnn_jax.lab.tasks.models import LSTM, TransformerLM, describe_model
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, Metric, ModelState, Params, Sums, Task

_EVALUATION_BATCH_SIZE = 100
_MAX_EVALUATION_PIECES = 1_000


def perplexity(cross_entropy: float) -> float:
    """The exponential of a cross entropy in nats; infinity where that is too large for a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """Training of a network to predict the next token at every position of a text, by the cross entropy.

    Training batches are windows at random places of the training text. Evaluation is on consecutive pieces, which do
    not overlap: the first 1,000 of a split, or all where there are fewer, so that it costs less than some 30 steps.

    Attributes:
      dataset: the text.
      model: maps tokens `[n, length]` to logits `[n, length, vocab_size]`, without seeing what follows a position.
      batch_size: windows per step.
      context_length: tokens that the model is given at once.

    Raises:
      UsageError: if the context is not positive, longer than the model allows, or than a split of the text, or if
        batches have more windows than there are in the training text.
    """

    dataset: TextDataset
    model: nn.Module
    batch_size: int
    context_length: int = 64

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise UsageError(f"context_length={self.context_length} must be positive.")
        longest = getattr(self.model, "max_length", math.inf)
        if self.context_length > longest:
            raise UsageError(
                f"context_length={self.context_length} is longer than the model's max_length={longest}; "
                "let it be at most that."
            )
        shortest = min(len(self.dataset.train), len(self.dataset.validation), len(self.dataset.test))
        if self.context_length >= shortest:
            raise UsageError(
                f"context_length={self.context_length} must be less than the {shortest} tokens of the shortest split."
            )
        check_batch_size(self.batch_size, self._num_windows)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The perplexity, the cross entropy in nats, and the share of tokens that are predicted right."""
        return (
            Metric("perplexity", higher_is_better=False, from_mean=perplexity, format=".3f"),
            Metric("loss", higher_is_better=False),
            Metric("accuracy", higher_is_better=True, format=".2%"),
        )

    def with_training_text(self, part: slice) -> "LanguageModel":
        """The same task with a part of its training text only.

        Args:
          part: which tokens of the whole training text.

        Raises:
          UsageError: if these are fewer than a batch needs.
        """
        dataset = dataclasses.replace(self.dataset, train=self.dataset.train[part])
        return dataclasses.replace(self, dataset=dataset)

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on."""
        return {
            "kind": "language model",
            "dataset": {"name": self.dataset.name, "sha256": self.dataset.digest},
            "model": describe_model(self.model),
            "batch_size": self.batch_size,
            "context_length": self.context_length,
            "max_evaluation_pieces": _MAX_EVALUATION_PIECES,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters as the model initialises them; there is no model state."""
        tokens = jnp.asarray(self.dataset.train[None, : self.context_length], jnp.int32)
        return self.model.init(key, tokens)["params"], {}

    def loss(
        self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean cross entropy over all tokens of a batch."""
        del key
        _, cross_entropy, _ = self._predict(params, batch)
        return cross_entropy.mean(), (model_state, {})

    def batch(self, seed: int, step: int) -> Batch:
        """Windows at random places of the training text, `[batch_size, context_length + 1]` uint8."""
        starts = np.random.default_rng([seed, step]).integers(self._num_windows, size=self.batch_size)
        return {"tokens": self.dataset.train[starts[:, None] + np.arange(self.context_length + 1)]}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        """Consecutive pieces of a split, up to 100 at a time, `[n, context_length + 1]` uint8.

        The last token of a piece, which is only predicted, is the first of the next piece, which is only given.
        """
        tokens = getattr(self.dataset, split)
        length = self.context_length
        num_pieces = min((len(tokens) - 1) // length, _MAX_EVALUATION_PIECES)
        starts = np.arange(num_pieces) * length
        for first in range(0, num_pieces, _EVALUATION_BATCH_SIZE):
            chosen = starts[first : first + _EVALUATION_BATCH_SIZE]
            yield {"tokens": tokens[chosen[:, None] + np.arange(length + 1)]}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        """The sum of cross entropies, also for the perplexity, and the number of tokens that are predicted right."""
        del model_state
        logits, cross_entropy, targets = self._predict(params, batch)
        count = jnp.float32(targets.size)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == targets, dtype=jnp.float32)
        total = cross_entropy.sum()
        return {"perplexity": (total, count), "loss": (total, count), "accuracy": (correct, count)}

    @property
    def _num_windows(self) -> int:
        return len(self.dataset.train) - self.context_length

    def _predict(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits `[n, length, vocab_size]`, cross entropies `[n, length]`, and the tokens to predict, of that shape."""
        tokens = jnp.asarray(batch["tokens"], jnp.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits: Any = self.model.apply({"params": params}, inputs)
        return logits, optax.softmax_cross_entropy_with_integer_labels(logits, targets), targets


def load_language_model(
    data_dir: Path, *, dataset: str, model: Callable[[int], nn.Module], batch_size: int, context_length: int
) -> LanguageModel:
    """The task of predicting a text of the table of data sets.

    Args:
      data_dir: the folder of data sets prepared by TensorFlow Datasets.
      dataset: the name of the text.
      model: makes the model, given the number of different tokens.
      batch_size: windows per step.
      context_length: tokens that the model is given at once.

    Raises:
      UsageError: if the data set is missing, not known or no text.
    """
    text = load_text(dataset, data_dir)
    return LanguageModel(
        dataset=text, model=model(text.vocab_size), batch_size=batch_size, context_length=context_length
    )


TASKS: dict[str, Callable[[Path], Task]] = {
    "shakespeare-transformer": functools.partial(
        load_language_model,
        dataset="tiny_shakespeare",
        model=functools.partial(TransformerLM, width=48, num_layers=1, max_length=64),
        batch_size=32,
        context_length=64,
    ),
    "shakespeare-lstm": functools.partial(
        load_language_model, dataset="tiny_shakespeare", model=LSTM, batch_size=32, context_length=64
    ),
}
