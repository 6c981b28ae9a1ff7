import jax
import numpy as np
from scipy import ndimage

from wnn_jax.lab.tasks.data.datasets import random_affine, random_mirror


def test_each_image_is_transformed_as_scipy_does():
    key, images = jax.random.key(2), jax.random.uniform(jax.random.key(1), [8, 15, 11, 1])
    keys = jax.random.split(key, 3)
    angles = np.deg2rad(jax.random.uniform(keys[0], [8], minval=-10.0, maxval=10.0))
    shifts = np.asarray(jax.random.uniform(keys[1], [8, 2], minval=-0.15, maxval=0.15)) * [15, 11]
    zooms = np.asarray(jax.random.uniform(keys[2], [8, 2], minval=0.7, maxval=1.3))
    changed = jax.jit(random_affine)(key, images)
    assert changed.shape == images.shape
    center = np.array([7, 5])
    for image, actual, angle, shift, zoom in zip(np.asarray(images), changed, angles, shifts, zooms, strict=True):
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(zoom)
        offset = center + shift - matrix @ center
        expected = ndimage.affine_transform(image[..., 0], matrix, offset, order=1, mode="nearest")
        np.testing.assert_allclose(actual[..., 0], expected, atol=1e-4)


def test_half_of_the_images_are_mirrored():
    images = jax.random.uniform(jax.random.key(1), [400, 3, 4, 2])
    changed = np.asarray(random_mirror(jax.random.key(0), images))
    same = np.all(changed == np.asarray(images), axis=(1, 2, 3))
    mirrored = np.all(changed == np.asarray(images)[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 150 < mirrored.sum() < 250
