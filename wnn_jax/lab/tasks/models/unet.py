"""Networks from images to images.

Height and width of the images must be divisible by 2 for each resolution after the first. `features` are the channels
at each resolution, the full one first. They are multiples of `group_size`, the channels that GroupNorm normalises
together.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def _sinusoidal_embedding(times: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of times `[n]`, as `[n, width]` (Vaswani et al., NeurIPS 2017, section 3.5)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angles = times.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ResidualBlock(nn.Module):
    """Two convolutions after GroupNorm and SiLU, with an optional embedding `[n, time_width]` added between them."""

    features: int
    group_size: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None) -> jax.Array:
        branch = nn.silu(nn.GroupNorm(None, self.group_size)(x))
        branch = nn.Conv(self.features, (3, 3))(branch)
        if time is not None:
            branch = branch + nn.Dense(self.features)(time)[:, None, None]
        branch = nn.silu(nn.GroupNorm(None, self.group_size)(branch))
        branch = nn.Conv(self.features, (3, 3))(branch)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1))(x)
        return x + branch


class UNet(nn.Module):
    """A small U-Net for diffusion (Ho et al., NeurIPS 2020), without attention.

    It maps images and times `[n]` to images of the same shape. `time_width` is the width of the time's embedding.
    """

    features: Sequence[int] = (8, 16)
    group_size: int = 4
    time_width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array) -> jax.Array:
        time = nn.silu(nn.Dense(self.time_width)(_sinusoidal_embedding(times, self.time_width)))
        return _apply_unet(images, time, self.features, self.group_size, images.shape[-1])


class SegmentationUNet(nn.Module):
    """A small U-Net with `num_classes` logits for every pixel (Ronneberger et al., MICCAI 2015)."""

    num_classes: int = 10
    features: Sequence[int] = (8, 16)
    group_size: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return _apply_unet(images, None, self.features, self.group_size, self.num_classes)


def _apply_unet(
    images: jax.Array, time: jax.Array | None, widths: Sequence[int], group_size: int, num_outputs: int
) -> jax.Array:
    """Apply one residual block per resolution on the way down and on the way up, in the module that calls."""
    x = nn.Conv(widths[0], (3, 3))(images)
    skipped: list[jax.Array] = []
    for features in widths[:-1]:
        x = ResidualBlock(features, group_size)(x, time)
        skipped.append(x)
        x = nn.Conv(features, (3, 3), 2)(x)
    x = ResidualBlock(widths[-1], group_size)(x, time)
    for features in reversed(widths[:-1]):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jnp.concatenate([x, skipped.pop()], axis=-1)
        x = ResidualBlock(features, group_size)(x, time)
    x = nn.silu(nn.GroupNorm(None, group_size)(x))
    return nn.Conv(num_outputs, (3, 3))(x)
