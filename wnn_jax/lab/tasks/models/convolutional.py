"""Networks that are one chain of convolutions."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from wnn_jax.lab.tasks.models.layers import ConvNorm, max_pool


class VanillaCNN(nn.Module):
    """Convolutions with max-pooling after each, a hidden dense layer and a classifier.

    With the defaults, the "vanilla CNN" of Jang et al., ICML 2023.

    Attributes:
      num_classes: number of logits.
      features: channels of each convolution.
      hidden: features of each hidden dense layer.
      window: height and width of every convolution's window.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32, 32)
    hidden: Sequence[int] = (64,)
    window: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images
        for features in self.features:
            x = max_pool(nn.relu(nn.Conv(features, (self.window, self.window))(x)))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class ThreeConv(nn.Module):
    """Three 3x3 convolutions, global average pooling and a classifier.

    The first convolution has stride 2 and no padding. With the defaults, the network of the tasks C10/16 and
    FM/16 of Knyazev et al., ICLR 2025.

    Attributes:
      num_classes: number of logits.
      features: channels of each convolution.
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


class VGG(nn.Module):
    """Pairs of convolutions with BatchNorm, max-pooling after each pair (Simonyan and Zisserman, ICLR 2015).

    Attributes:
      num_classes: number of logits.
      features: channels of each pair.
    """

    num_classes: int = 10
    features: Sequence[int] = (12, 24)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images
        for features in self.features:
            x = ConvNorm(features)(x, train=train)
            x = max_pool(ConvNorm(features)(x, train=train))
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))
