import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from wnn_jax.lab.tasks.data import load_digits
from wnn_jax.lab.tasks.data.datasets import ImageDataset, LabeledImages
from wnn_jax.lab.tasks.segmentation import Segmentation, compose_scenes
from wnn_jax.lab.training.program import Program


class Convolution(nn.Module):
    """One layer, so that the tests of the task take no time to compile."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Conv(11, (5, 5))(images)


@functools.cache
def scenes() -> ImageDataset:
    return compose_scenes(load_digits(), (200, 60, 70))


def make_task(**changes: Any) -> Segmentation:
    arguments: dict[str, Any] = {"dataset": scenes(), "model": Convolution(), "batch_size": 8}
    return Segmentation(**(arguments | changes))


def test_scenes_are_always_the_same_and_have_every_class():
    dataset = scenes()
    assert dataset.num_classes == 11
    for split, number in ((dataset.train, 200), (dataset.validation, 60), (dataset.test, 70)):
        assert split.images.shape == (number, 20, 20, 1)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (number, 20, 20)
        assert set(np.unique(split.labels)) == set(range(11))
        numbers = {len(np.unique(labels)) for labels in split.labels}
        assert (min(numbers), max(numbers)) == (2, 4)
    small = [compose_scenes(load_digits(), (3, 2, 2)).digest for _ in range(2)]
    assert small[0] == small[1]


def test_scenes_of_a_split_have_digits_of_that_split():
    digits = load_digits()
    of_one = {
        split: LabeledImages(getattr(digits, split).images[:1], np.array([number], np.int32))
        for number, split in enumerate(("train", "validation", "test"))
    }
    dataset = compose_scenes(dataclasses.replace(digits, **of_one), (3, 3, 3))  # pyright: ignore[reportArgumentType]
    for number, split in enumerate((dataset.train, dataset.validation, dataset.test)):
        assert set(np.unique(split.labels)) == {0, number + 1}


def test_the_mean_iou_is_of_all_pixels_of_a_split_and_of_the_classes_that_occur(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnn_jax.lab.tasks.image_classification._EVALUATION_BATCH_SIZE", 25)
    images, labels = scenes().validation
    # No pixel is a 3.
    labels = np.where(labels == 4, 0, labels)
    task = make_task(dataset=dataclasses.replace(scenes(), validation=LabeledImages(images, labels)))
    params, _ = jax.jit(task.init)(jax.random.key(0))
    # No pixel is taken for a 3.
    params["Conv_0"]["bias"] = params["Conv_0"]["bias"].at[4].set(-100)
    logits = np.asarray(task.model.apply({"params": params}, task.dataset.preprocess(images)))
    predicted = np.argmax(logits, axis=-1)
    ious = [
        np.sum((predicted == index) & (labels == index)) / np.sum((predicted == index) | (labels == index))
        for index in range(11)
        if index != 4
    ]
    scores = Program(task, optax.sgd(0.1)).evaluate(params, {}, "validation")
    assert scores["mIoU"] == pytest.approx(np.mean(ious), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(np.mean(predicted == labels), rel=1e-5)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_probabilities, labels[..., None], axis=-1).mean()
    assert scores["loss"] == pytest.approx(expected, rel=1e-4)
