import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from experiments.harness.augment import random_affine
from wnn_jax.meta.architectures import ThreeConv, VanillaCNN, max_pool
from wnn_jax.meta.datasets import load_digits


def test_digits_splits_are_real_and_disjoint() -> None:
    dataset = load_digits()
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split.targets) for split in splits] == [897, 500, 400]
    assert sum(split.inputs.astype(int).sum() for split in splits) == 561_718  # of all 1,797 images, none twice
    assert dataset.train.inputs.max() == dataset.max_value == 16
    assert dataset.mean_image.shape == (8, 8, 1)
    assert 0 < dataset.mean_image.mean() < 1


def testmax_pool_is_flaxmax_pool() -> None:
    images = jax.random.normal(jax.random.key(0), [2, 7, 6, 3])
    np.testing.assert_array_equal(max_pool(images), nn.max_pool(images, (2, 2), strides=(2, 2)))


@pytest.mark.parametrize(
    ("model", "num_params"),
    # Counted by hand from the papers' descriptions: 3x3 kernels and biases, then the dense layers.
    [
        (
            VanillaCNN(),
            (27 + 1) * 8 + (72 + 1) * 16 + (144 + 1) * 32 + (288 + 1) * 32 + (2 * 2 * 32 + 1) * 64 + (64 + 1) * 10,
        ),
        (ThreeConv(), (27 + 1) * 16 + (144 + 1) * 32 + (288 + 1) * 32 + (32 + 1) * 10),
    ],
)
def test_models_have_the_papers_sizes(model: nn.Module, num_params: int) -> None:
    images = jnp.zeros([2, 32, 32, 3])
    params = model.init(jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params
    logits = model.apply(params, images)
    assert isinstance(logits, jax.Array)
    assert logits.shape == (2, 10)


def test_no_range_leaves_images_as_they_are() -> None:
    images = jax.random.uniform(jax.random.key(1), [3, 9, 8, 2])
    same = random_affine(jax.random.key(0), images, max_degrees=0.0, max_shift=0.0, max_zoom=0.0)
    np.testing.assert_allclose(same, images, atol=1e-6)


def test_a_rotation_is_scipys() -> None:
    image = np.asarray(jax.random.uniform(jax.random.key(1), [1, 15, 15, 1]))
    key = jax.random.key(2)
    rotated = random_affine(key, jnp.asarray(image), max_degrees=40.0, max_shift=0.0, max_zoom=0.0)
    degrees = jax.random.uniform(jax.random.split(key, 3)[0], [1], minval=-40.0, maxval=40.0).item()
    expected = ndimage.rotate(image[0, :, :, 0], -degrees, reshape=False, order=1, mode="nearest")
    assert abs(degrees) > 5
    np.testing.assert_allclose(rotated[0, :, :, 0], expected, atol=1e-4)


def test_images_change_each_in_their_own_way() -> None:
    images = jnp.tile(jax.random.uniform(jax.random.key(1), [1, 16, 16, 3]), [4, 1, 1, 1])
    changed = np.asarray(random_affine(jax.random.key(0), images))
    assert changed.shape == images.shape
    assert not np.allclose(changed[0], changed[1], atol=1e-2)
    assert changed.min() >= 0
    assert changed.max() <= 1
