import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.lab.tasks.conformance import Training, assert_equal, target
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import load_digits
from wnn_jax.lab.tasks.data.datasets import random_affine, random_mirror
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.models import MLP, ResNet


def make_task(**changes: Any) -> ImageClassification:
    arguments: dict[str, Any] = {"dataset": load_digits(), "model": MLP(widths=(8,)), "batch_size": 64}
    return ImageClassification(**(arguments | changes))


def test_accuracy_and_loss_are_of_the_logits():
    task = make_task()
    params, _ = jax.jit(task.init)(jax.random.key(0))
    batch = next(task.evaluation_batches("test"))
    logits: Any = task.model.apply({"params": params}, task.dataset.preprocess(batch["images"]))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    sums = task.measure(params, {}, batch)
    assert sums["accuracy"] == (np.sum(np.argmax(logits, axis=1) == batch["labels"]), 400)
    expected = -log_probabilities[np.arange(400), batch["labels"]].sum()
    np.testing.assert_allclose(sums["loss"][0], expected, rtol=1e-5)
    loss, _ = task.loss(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, expected / 400, rtol=1e-5)


def test_the_augmentation_is_given_the_key_of_the_step():
    # Recorded results rely on it.
    plain, augmented = make_task(), make_task(augment=random_affine)
    params, _ = jax.jit(plain.init)(jax.random.key(0))
    batch, key = plain.batch(0, 0), jax.random.key(5)
    images = (
        jax.jit(random_affine)(key, jnp.asarray(batch["images"], jnp.float32) / 16) - plain.dataset.mean_image[None]
    )
    logits: Any = plain.model.apply({"params": params}, images)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
    np.testing.assert_allclose(jax.jit(augmented.loss)(params, {}, batch, key)[0], expected, rtol=1e-5)
    assert_equal(augmented.measure(params, {}, batch), plain.measure(params, {}, batch))


def test_batch_norm_evaluates_with_running_statistics():
    task = make_task(model=ResNet(features=(4,)))
    training = Training(task, optax.adam(1e-2))
    state, _ = training.run(40)
    measure = jax.jit(task.measure)
    batch = next(task.evaluation_batches("test"))
    total, _ = measure(state.params, state.model_state, batch)["accuracy"]
    # What one image is taken for does not depend on the others.
    parts = [jax.tree.map(lambda leaf, part=part: leaf[part], batch) for part in (slice(1), slice(1, None))]
    assert sum(measure(state.params, state.model_state, part)["accuracy"][0] for part in parts) == total
    assert target(task, state) > 2 * target(task, state._replace(model_state=training.init().model_state))


def test_a_part_of_the_training_images():
    task = make_task()
    part = task.with_training_examples(slice(100, 200))
    rest = task.with_training_examples(slice(200, None))
    images = {image.tobytes() for image in part.batch(0, 0)["images"]}
    assert images <= {image.tobytes() for image in task.dataset.train.images[100:200]}
    assert_equal(rest.init(jax.random.key(0)), task.init(jax.random.key(0)))
    assert part.describe()["training_examples"] == [100, 200, 1]
    assert len({str(each.describe()) for each in (task, part, rest)}) == 3
    assert_equal(task.with_training_examples(slice(None)).batch(3, 20), task.batch(3, 20))
    with pytest.raises(UsageError, match="batch_size=64 must be positive and at most 10, the training"):
        task.with_training_examples(slice(10))


def test_descriptions_tell_tasks_apart():
    tasks = [
        make_task(),
        make_task(model=MLP(widths=(9,))),
        make_task(batch_size=32),
        make_task(augment=random_mirror),
        make_task(augment=random_affine),
        make_task(dataset=dataclasses.replace(load_digits(), test=load_digits().validation)),
    ]
    assert len({str(task.describe()) for task in tasks}) == len(tasks)


def test_an_augmentation_without_a_name_is_refused():
    with pytest.raises(UsageError, match=r"augment=.*has no name"):
        make_task(augment=lambda key, images: images)
