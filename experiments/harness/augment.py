"""Random affine changes of images, on the device."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


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
