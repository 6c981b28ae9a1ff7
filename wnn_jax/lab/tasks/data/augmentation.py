"""Random changes of images, on the device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from wnn_jax.lab.errors import UsageError

# From a `jax.random` key and images `[n, height, width, channels]` in [0, 1] to images of the same shape.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def random_mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Swap left and right of each image with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=[images.shape[0], 1, 1, 1])
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_affine(key: jax.Array, images: jax.Array) -> jax.Array:
    """Rotate, shift and zoom each image on its own, with bilinear interpolation and repeated edge pixels.

    This is the augmentation of Jang et al., ICML 2023: uniform rotations up to 10 degrees, shifts up to 15 % of the
    size, and zooms of each axis up to 30 %.
    """
    number, height, width, _ = images.shape
    keys = jax.random.split(key, 3)
    angle = jnp.deg2rad(jax.random.uniform(keys[0], [number], minval=-10.0, maxval=10.0))
    shift = jax.random.uniform(keys[1], [number, 2], minval=-0.15, maxval=0.15)
    zoom = jax.random.uniform(keys[2], [number, 2], minval=0.7, maxval=1.3)
    return jax.vmap(_affine)(images, angle, shift * jnp.array([[height, width]]), zoom)


def _affine(image: jax.Array, angle: jax.Array, shift: jax.Array, zoom: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - center_y, jnp.arange(width) - center_x, indexing="ij")
    y, x = y * zoom[0], x * zoom[1]
    source_y = jnp.cos(angle) * y - jnp.sin(angle) * x + shift[0] + center_y
    source_x = jnp.sin(angle) * y + jnp.cos(angle) * x + shift[1] + center_x
    sample = functools.partial(map_coordinates, coordinates=[source_y, source_x], order=1, mode="nearest")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def describe_augment(augment: Augment | None) -> dict[str, Any] | None:
    """The name and the options of an augmentation as JSON. Without a name of its own it is a `UsageError`."""
    if augment is None:
        return None
    function, options = augment, {}
    if isinstance(augment, functools.partial) and not augment.args:
        function, options = augment.func, dict(augment.keywords)
    name = getattr(function, "__qualname__", "<unnamed>")
    if "<" in name:
        raise UsageError(
            f"augment={augment!r} has no name by which results could be told apart; write a function at the top level "
            "of a module, and give it options by functools.partial(function, option=value)."
        )
    return {"name": name, "options": options}
