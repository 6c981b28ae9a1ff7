"""The networks that the experiments train."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def _max_pool(images: jax.Array) -> jax.Array:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped.

    The same as `nn.max_pool`, whose gradient is slow on CPU.
    """
    batch, height, width, channels = images.shape
    images = images[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(images.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class VanillaCNN(nn.Module):
    """Convolutions with max-pooling after each, a hidden dense layer and a classifier.

    With the defaults, the "vanilla CNN" of Jang et al., ICML 2023.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32, 32)
    hidden: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images
        for features in self.features:
            x = _max_pool(nn.relu(nn.Conv(features, (3, 3))(x)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class ThreeConv(nn.Module):
    """Three 3x3 convolutions, global average pooling and a classifier.

    The first convolution has stride 2 and no padding. With the defaults, the network of the tasks C10/16 and
    FM/16 of Knyazev et al., ICLR 2025.
    """

    num_classes: int = 10
    features: Sequence[int] = (16, 32, 32)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images
        for index, features in enumerate(self.features):
            first = index == 0
            x = nn.Conv(features, (3, 3), strides=2 if first else 1, padding="VALID" if first else "SAME")(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))
