import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.lab.tasks.synthetic import synthetic_images, synthetic_text
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import check_datasets, load_dataset, load_digits, load_images, load_text
from wnn_jax.lab.tasks.data.images import half_size
from wnn_jax.lab.tasks.data.prepared import read_prepared

PREPARED = Path(__file__).parents[5] / "shared" / "data" / "tfds"


def prepared(name: str) -> pytest.MarkDecorator:
    reason = f"no prepared {name} beside the repository, in ../shared/data/tfds"
    return pytest.mark.skipif(not (PREPARED / name).is_dir(), reason=reason)


def test_digits_splits_are_real_and_disjoint():
    dataset = load_digits()
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split.labels) for split in splits] == [897, 500, 400]
    assert sum(split.images.astype(int).sum() for split in splits) == 561_718  # of all 1,797 images, none twice
    assert dataset.train.images.max() == dataset.max_value == 16
    assert dataset.mean_image.shape == (8, 8, 1)
    assert 0 < dataset.mean_image.mean() < 1


def test_networks_are_given_centred_images():
    dataset = load_digits()
    images = dataset.preprocess(dataset.train.images)
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-6)
    doubled = dataset.preprocess(dataset.train.images, lambda images: 2 * images)
    np.testing.assert_allclose(doubled, images + dataset.train.images / 16, atol=1e-6)


def test_images_of_half_the_size_are_means():
    dataset = synthetic_images("mnist")
    halved = half_size(dataset, "half")
    assert halved.name == "half"
    assert halved.test.images.shape == (40, 14, 14, 1)
    assert halved.test.images.dtype == np.uint8
    assert halved.test.images[3, 1, 2, 0] == round(dataset.test.images[3, 2:4, 4:6, 0].mean())
    np.testing.assert_array_equal(halved.test.labels, dataset.test.labels)


def test_digests_are_of_the_content():
    images, text = load_digits(), synthetic_text()
    assert load_digits().digest == images.digest
    assert synthetic_text().digest == text.digest
    assert dataclasses.replace(images, name="other").digest == images.digest
    labels = images.test.labels.copy()
    labels[-1] += 1
    assert dataclasses.replace(images, test=images.test._replace(labels=labels)).digest != images.digest
    assert dataclasses.replace(images, validation=images.test, test=images.validation).digest != images.digest
    assert dataclasses.replace(text, vocab_size=66).digest != text.digest


def test_a_data_set_is_loaded_once(tmp_path: Path):
    assert load_dataset("digits", tmp_path) is load_dataset("digits", tmp_path)


def test_all_missing_data_sets_are_listed_at_once(tmp_path: Path):
    check_datasets(["digits"], tmp_path)
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").touch()
    (tmp_path / "cifar10" / "incomplete").mkdir(parents=True)
    names = ["digits", "cifar10-16", "mnist-14", "coco-pose", "tiny_shakespeare", "cifar10"]
    with pytest.raises(UsageError) as caught:
        check_datasets(names, tmp_path)
    message = str(caught.value)
    assert f"--data-dir {tmp_path} holds no 'cifar10' and no 'coco_pose' and no 'tiny_shakespeare' folder" in message
    assert "for name in ['cifar10', 'tiny_shakespeare']" in message
    assert "'coco_pose' is a builder of your own" in message
    assert message.endswith("there: mnist, mnist-14, digits. The family 'digits' needs no download.")
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    with pytest.raises(UsageError, match="holds no 'cifar10' folder prepared by TensorFlow Datasets"):
        load_dataset("cifar10-16", tmp_path)


def test_an_unknown_data_set_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"the data set 'imagenet' is not known; choose from cifar10, .*digits"):
        check_datasets(["digits", "imagenet"], tmp_path)


def test_another_kind_of_data_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="the data set 'digits' is not a text; choose one that is"):
        load_text("digits", tmp_path)
    with pytest.raises(UsageError, match="the data set 'digits' has no keypoints; choose one that has"):
        load_poses("digits", tmp_path)


@prepared("tiny_shakespeare")
def test_the_real_text():
    text = load_text("tiny_shakespeare", PREPARED)
    assert text.vocab_size == 65
    assert len(text.train) + len(text.validation) + len(text.test) == 1_115_394
    assert text.train.dtype == np.uint8
    assert text.train.max() == 64
    with pytest.raises(UsageError, match="'tiny_shakespeare' does not consist of images; choose one that does"):
        load_images("tiny_shakespeare", PREPARED)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("cifar10", (32, 32, 3), marks=prepared("cifar10")),
        pytest.param("mnist", (28, 28, 1), marks=prepared("mnist")),
    ],
)
def test_the_real_images(name: str, shape: tuple[int, ...]):
    # Only a few: to decode all of them takes seconds.
    examples = read_prepared(name, "test[:20]", PREPARED)
    images = np.stack([example["image"] for example in examples])
    assert images.shape == (20, *shape)
    assert images.dtype == np.uint8
    assert all(0 <= example["label"] < 10 for example in examples)
