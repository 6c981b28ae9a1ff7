"""Networks whose convolutions are depthwise, with 1x1 convolutions between them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax.lab.tasks.models.layers import Classifier, ConvNorm


class MobileNetV2(nn.Module):
    """Inverted residual blocks: expand, filter depthwise, project (Sandler et al., CVPR 2018).

    Attributes:
      num_classes: number of logits.
      features: channels of each block.
      expansion: how many times more channels the depthwise convolutions have.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 12, 16)
    expansion: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(8, strides=2)(images, train=train)
        for features in self.features:
            hidden = x.shape[-1] * self.expansion
            strides = 1 if features == x.shape[-1] else 2
            block = ConvNorm(hidden, kernel=1)(x, train=train)
            block = ConvNorm(hidden, strides=strides, depthwise=True)(block, train=train)
            block = ConvNorm(features, kernel=1, relu=False)(block, train=train)
            x = x + block if strides == 1 else block
        return Classifier(self.num_classes)(ConvNorm(48, kernel=1)(x, train=train))


class ShuffleNetV2(nn.Module):
    """Half of the channels pass by, half are filtered depthwise, all are shuffled (Ma et al., ECCV 2018).

    Attributes:
      num_classes: number of logits.
      features: channels of all blocks, an even number.
      num_blocks: number of blocks.
    """

    num_classes: int = 10
    features: int = 24
    num_blocks: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(self.features, strides=2)(images, train=train)
        half = self.features // 2
        for _ in range(self.num_blocks):
            passed, x = jnp.split(x, 2, axis=-1)
            x = ConvNorm(half, kernel=1)(x, train=train)
            x = ConvNorm(half, depthwise=True, relu=False)(x, train=train)
            x = ConvNorm(half, kernel=1)(x, train=train)
            x = jnp.stack([passed, x], axis=-1).reshape(*x.shape[:-1], self.features)
        return Classifier(self.num_classes)(ConvNorm(48, kernel=1)(x, train=train))
