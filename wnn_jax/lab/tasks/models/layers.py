"""Layers that several networks are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH_NORM_MOMENTUM = 0.9


def max_pool(images: jax.Array) -> jax.Array:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped.

    The same as `nn.max_pool`, whose gradient is slow on CPU.

    Args:
      images: `[n, height, width, channels]`.

    Returns:
      `[n, height // 2, width // 2, channels]`.
    """
    batch, height, width, channels = images.shape
    images = images[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(images.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation and, by default, a ReLU.

    Attributes:
      features: output channels.
      kernel: height and width of the window.
      strides: of both axes.
      depthwise: whether each channel has a window of its own.
      relu: whether a ReLU comes last.
    """

    features: int
    kernel: int = 3
    strides: int = 1
    depthwise: bool = False
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[n, height, width, channels]` to `[n, ceil(height / strides), ceil(width / strides), features]`.

        Args:
          x: the input.
          train: whether to normalise by the statistics of the batch, and update the running ones.
        """
        groups = x.shape[-1] if self.depthwise else 1
        window = (self.kernel, self.kernel)
        x = nn.Conv(self.features, window, strides=self.strides, feature_group_count=groups, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=BATCH_NORM_MOMENTUM)(x)
        return nn.relu(x) if self.relu else x


class Classifier(nn.Module):
    """The end of most networks: the mean over all positions, and a dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, height, width, channels]` to logits `[n, num_classes]`."""
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))
