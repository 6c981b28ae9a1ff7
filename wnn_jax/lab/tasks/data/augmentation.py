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
    """Mirrors every image, left and right, with probability 1/2.

    Args:
      key: a `jax.random` key.
      images: `[n, height, width, channels]`.

    Returns:
      Images of the same shape.
    """
    mirrored = jax.random.bernoulli(key, shape=[images.shape[0], 1, 1, 1])
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_affine(
    key: jax.Array,
    images: jax.Array,
    *,
    max_degrees: float = 10.0,
    max_shift: float = 0.15,
    max_zoom: float = 0.3,
) -> jax.Array:
    """Rotates, shifts and zooms every image on its own, with bilinear interpolation and the edge pixels repeated.

    The defaults are the augmentation of Jang et al., ICML 2023.

    Args:
      key: a `jax.random` key.
      images: `[n, height, width, channels]`.
      max_degrees: rotations are uniform in plus or minus this.
      max_shift: shifts are uniform in plus or minus this share of the height and of the width.
      max_zoom: the zoom of each axis is uniform in 1 plus or minus this.

    Returns:
      Images of the same shape.
    """
    number, height, width, _ = images.shape
    keys = jax.random.split(key, 3)
    angle = jnp.deg2rad(jax.random.uniform(keys[0], [number], minval=-max_degrees, maxval=max_degrees))
    shift = jax.random.uniform(keys[1], [number, 2], minval=-max_shift, maxval=max_shift)
    zoom = jax.random.uniform(keys[2], [number, 2], minval=1 - max_zoom, maxval=1 + max_zoom)
    shift = shift * jnp.array([[height, width]])
    return jax.vmap(_affine)(images, angle, shift, zoom)


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
    """The name of an augmentation and the options that it is given, of what JSON has.

    Raises:
      UsageError: if it has no name that tells it from others.
    """
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
