import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import describe_augment, random_affine, random_mirror


def test_no_range_leaves_images_as_they_are():
    images = jax.random.uniform(jax.random.key(1), [3, 9, 8, 2])
    same = random_affine(jax.random.key(0), images, max_degrees=0.0, max_shift=0.0, max_zoom=0.0)
    np.testing.assert_allclose(same, images, atol=1e-6)


def test_a_rotation_is_scipys():
    image = np.asarray(jax.random.uniform(jax.random.key(1), [1, 15, 15, 1]))
    key = jax.random.key(2)
    rotated = random_affine(key, jnp.asarray(image), max_degrees=40.0, max_shift=0.0, max_zoom=0.0)
    degrees = jax.random.uniform(jax.random.split(key, 3)[0], [1], minval=-40.0, maxval=40.0).item()
    expected = ndimage.rotate(image[0, :, :, 0], -degrees, reshape=False, order=1, mode="nearest")
    assert abs(degrees) > 5
    np.testing.assert_allclose(rotated[0, :, :, 0], expected, atol=1e-4)


def test_images_change_each_in_their_own_way():
    images = jnp.tile(jax.random.uniform(jax.random.key(1), [1, 16, 16, 3]), [4, 1, 1, 1])
    changed = np.asarray(random_affine(jax.random.key(0), images))
    assert changed.shape == images.shape
    assert not np.allclose(changed[0], changed[1], atol=1e-2)
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_half_of_the_images_are_mirrored():
    images = jax.random.uniform(jax.random.key(1), [400, 3, 4, 2])
    changed = np.asarray(random_mirror(jax.random.key(0), images))
    same = np.all(changed == np.asarray(images), axis=(1, 2, 3))
    mirrored = np.all(changed == np.asarray(images)[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 150 < mirrored.sum() < 250


def test_augmentations_are_told_apart_by_name_and_options():
    assert describe_augment(None) is None
    assert describe_augment(random_mirror) == {"name": "random_mirror", "options": {}}
    wide = functools.partial(random_affine, max_degrees=20.0)
    assert describe_augment(wide) == {"name": "random_affine", "options": {"max_degrees": 20.0}}
    with pytest.raises(UsageError, match="has no name by which results could be told apart; write a function"):
        describe_augment(lambda key, images: images)
