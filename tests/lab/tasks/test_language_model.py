import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from tests.lab.tasks.synthetic import synthetic_text
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.language_model import LanguageModel, perplexity
from wnn_jax.lab.tasks.models import TransformerLM


def make_task(**changes: Any) -> LanguageModel:
    model = TransformerLM(65, width=16, num_heads=2)
    arguments: dict[str, Any] = {"dataset": synthetic_text(), "model": model, "batch_size": 16, "context_length": 8}
    return LanguageModel(**(arguments | changes))


def test_windows_are_at_random_places_of_the_text():
    task = make_task()
    text, starts = task.dataset.train.tobytes(), set[int]()
    for step in range(4):
        tokens = task.batch(0, step)["tokens"]
        assert tokens.shape == (16, 9)
        assert tokens.dtype == np.uint8
        assert all(window.tobytes() in text for window in tokens)
        starts |= {text.index(window.tobytes()) for window in tokens}
    assert len(starts) > 60
    assert len({start % 8 for start in starts}) == 8


def test_a_text_of_one_window_is_enough():
    text = synthetic_text()
    short = dataclasses.replace(text, train=text.train[:9])
    task = make_task(dataset=short, batch_size=1)
    np.testing.assert_array_equal(task.batch(0, 0)["tokens"], text.train[None, :9])
    with pytest.raises(UsageError, match="batch_size=2 must be positive and at most 1, the training examples"):
        make_task(dataset=short, batch_size=2)


def test_evaluation_is_on_consecutive_pieces():
    task = make_task()
    pieces = np.concatenate([batch["tokens"] for batch in task.evaluation_batches("test")])
    assert pieces.shape == (87, 9)
    assert pieces.dtype == np.uint8
    np.testing.assert_array_equal(pieces[:, :-1].ravel(), task.dataset.test[: 87 * 8])
    np.testing.assert_array_equal(pieces[:, 1:].ravel(), task.dataset.test[1 : 87 * 8 + 1])
    bounded = make_task(context_length=4).evaluation_batches("validation")
    assert sum(len(batch["tokens"]) for batch in bounded) == 1_000


def test_perplexity_is_the_exponential_of_the_loss():
    task = make_task()
    params, _ = jax.jit(task.init)(jax.random.key(0))
    batch = next(task.evaluation_batches("test"))
    sums = jax.jit(task.measure)(params, {}, batch)
    tokens = batch["tokens"].astype(np.int32)
    logits: Any = jax.jit(task.model.apply)({"params": params}, tokens[:, :-1])
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).sum()
    for name in ("perplexity", "loss"):
        np.testing.assert_allclose(sums[name][0], expected, rtol=1e-5)
        assert sums[name][1] == 87 * 8
    assert sums["accuracy"] == (np.sum(np.argmax(logits, axis=-1) == tokens[:, 1:]), 87 * 8)
    metric = task.metrics[0]
    assert metric.name == "perplexity"
    assert metric.from_mean(math.log(65)) == pytest.approx(65)


def test_a_ruined_network_has_a_perplexity():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 0}, "context_length=0 must be positive and at most 64, for this model and text"),
        ({"context_length": 65}, "context_length=65 must be positive and at most 64"),
        ({"context_length": 700, "model": TransformerLM(65, max_length=1_000)}, "context_length=700 .* at most 699"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        make_task(**changes)
