import dataclasses
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.tasks.prepared import write_prepared
from tests.lab.tasks.synthetic import synthetic_images, synthetic_text
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import check_datasets, decode_images, load_dataset, load_digits, read_prepared
from wnn_jax.lab.tasks.data.datasets import batch_indices, check_batch_size, consecutive_batches

PREPARED = Path(__file__).parents[5] / "shared" / "data" / "tfds"


def prepared(name: str) -> pytest.MarkDecorator:
    reason = f"no prepared {name} in ../shared/data/tfds, outside of the repository"
    return pytest.mark.skipif(not (PREPARED / name).is_dir(), reason=reason)


def test_digits_splits_are_real_and_disjoint():
    dataset = load_digits()
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split.labels) for split in splits] == [897, 500, 400]
    assert sum(split.images.astype(int).sum() for split in splits) == 561_718  # of all 1,797 images, none twice
    assert dataset.train.images.max() == dataset.max_value == 16
    # Networks see centred images.
    images = dataset.preprocess(dataset.train.images)
    np.testing.assert_allclose(images.mean(axis=0), 0, atol=1e-6)
    assert images.shape[1:] == dataset.mean_image.shape == (8, 8, 1)
    doubled = dataset.preprocess(dataset.train.images, lambda images: 2 * images)
    np.testing.assert_allclose(doubled, images + dataset.train.images / 16, atol=1e-6)


def test_images_of_half_the_size_are_means():
    dataset = synthetic_images("mnist")
    halved = dataset.half_size("half")
    assert halved.name == "half"
    assert halved.test.images.shape == (40, 14, 14, 1)
    assert halved.test.images.dtype == np.uint8
    assert halved.test.images[3, 1, 2, 0] == round(dataset.test.images[3, 2:4, 4:6, 0].mean())
    np.testing.assert_array_equal(halved.test.labels, dataset.test.labels)


def test_digests_are_of_the_content():
    images, text = load_digits(), synthetic_text()
    assert dataclasses.replace(load_digits(), name="other").digest == images.digest
    assert synthetic_text().digest == text.digest
    labels = images.test.labels.copy()
    labels[-1] += 1
    assert dataclasses.replace(images, test=images.test._replace(labels=labels)).digest != images.digest
    assert dataclasses.replace(images, validation=images.test, test=images.validation).digest != images.digest
    assert dataclasses.replace(text, vocab_size=66).digest != text.digest


def test_recorded_results_rely_on_this_order():
    for seed, step in ((0, 0), (3, 5), (3, 7), (3, 6), (1, 1_000)):
        order = np.random.default_rng([seed, step // 3]).permutation(13).astype(np.int32)
        indices = batch_indices(seed, step, num_examples=13, batch_size=4)
        np.testing.assert_array_equal(indices, order[step % 3 * 4 : step % 3 * 4 + 4])
        assert indices.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        indices[0] = 5


def test_consecutive_batches_have_every_example_once():
    examples = {"x": np.arange(10), "y": np.arange(20).reshape(10, 2)}
    batches = list(consecutive_batches(examples, 4))
    assert [len(batch["y"]) for batch in batches] == [4, 4, 2]
    for name, array in examples.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), array)


def test_batches_that_cannot_be_made_are_refused():
    check_batch_size(13, 13)
    with pytest.raises(UsageError, match="batch_size=14 must be positive and at most 13, the training examples"):
        check_batch_size(14, 13)
    with pytest.raises(UsageError, match="batch_size=0 must be positive"):
        check_batch_size(0, 13)


def test_all_missing_data_sets_are_listed_at_once(tmp_path: Path):
    check_datasets(["digits"], tmp_path)
    assert load_dataset("digits", tmp_path) is load_dataset("digits", tmp_path)
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").touch()
    (tmp_path / "cifar10" / "incomplete").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        check_datasets(["digits", "cifar10-16", "mnist-14", "tiny_shakespeare", "cifar10"], tmp_path)
    message = str(caught.value)
    assert f"--data-dir {tmp_path} holds no 'cifar10' and no 'tiny_shakespeare' folder" in message
    assert "for name in ['cifar10', 'tiny_shakespeare']" in message
    assert message.endswith(
        "there: mnist, mnist-14, digits. The task 'digits-cnn' and the family 'digits' need no download."
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    with pytest.raises(UsageError, match="holds no 'cifar10' folder prepared by TensorFlow Datasets"):
        load_dataset("cifar10-16", tmp_path)
    with pytest.raises(UsageError, match=r"the data set 'imagenet' is not known; choose from cifar10, .*digits"):
        check_datasets(["digits", "imagenet"], tmp_path)


@prepared("tiny_shakespeare")
def test_the_real_text():
    text = load_dataset("tiny_shakespeare", PREPARED)
    assert text.vocab_size == 65
    assert len(text.train) + len(text.validation) + len(text.test) == 1_115_394
    assert text.train.dtype == np.uint8
    assert text.train.max() == 64


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("cifar10", (32, 32, 3), marks=prepared("cifar10")),
        pytest.param("mnist", (28, 28, 1), marks=prepared("mnist")),
    ],
)
def test_the_real_images(name: str, shape: tuple[int, ...]):
    # Only a few: it takes seconds to decode all of them.
    images, labels = decode_images(read_prepared(name, "test[:20]", PREPARED))
    assert (images.shape, images.dtype) == ((20, *shape), np.uint8)
    assert all(0 <= label < 10 for label in labels)


# Data with the shapes of data sets that are large or not here: its name, version, splits, image size and classes.
IMAGES: dict[str, tuple[str, str, dict[str, int], tuple[int, int, int], int]] = {
    "fashion-mnist": ("fashion_mnist", "3.0.1", {"train": 144, "test": 6}, (28, 28, 1), 10),
    "imagenet-64": ("imagenet_resized/64x64", "0.1.0", {"train": 200, "validation": 6}, (64, 64, 3), 1_000),
}


@pytest.mark.parametrize(("name", "held_out"), [("fashion-mnist", 12), ("imagenet-64", 2)])
def test_images_that_are_prepared_become_splits(name: str, held_out: int, tmp_path: Path):
    folder, _, splits, shape, num_classes = IMAGES[name]
    write_prepared(tmp_path, *IMAGES[name])
    dataset = load_dataset(name, tmp_path)
    train, test = splits.values()
    sizes = [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [train - held_out, held_out, test]
    assert (dataset.train.images.shape[1:], dataset.num_classes) == (shape, num_classes)
    first = read_prepared(folder, "train", tmp_path)[0]
    np.testing.assert_array_equal(dataset.train.images[0], first["image"])
    assert dataset.train.labels[0] == first["label"]


def test_what_cannot_be_read_says_why(tmp_path: Path):
    (tmp_path / "fashion_mnist").mkdir()
    with pytest.raises(UsageError, match="fashion_mnist cannot be read"):
        read_prepared("fashion_mnist", "train", tmp_path)
    assert not list((tmp_path / "fashion_mnist").iterdir()), "something was downloaded"
    write_prepared(tmp_path, "fashion_mnist", "3.0.1", {"train": 3}, (28, 28, 1), 10)
    with pytest.raises(UsageError, match=r"fashion_mnist cannot be read \(Unknown split 'test'.*with a split 'test'"):
        read_prepared("fashion_mnist", "test", tmp_path)
    info = next(tmp_path.glob("fashion_mnist/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UsageError, match=r"TFRECORD is not supported\); prepare it .* file_format='array_record'"):
        read_prepared("fashion_mnist", "train", tmp_path)


class Images(Sequence[dict[str, Any]]):
    """500 images that are made on access."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError
        return {"image": np.full([64, 64, 3], index % 256, np.uint8), "label": index}


def test_there_is_never_a_second_copy_of_the_images():
    tracemalloc.start()
    images, labels = decode_images(Images())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * images.nbytes
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(500) % 256)
    np.testing.assert_array_equal(labels, np.arange(500))
