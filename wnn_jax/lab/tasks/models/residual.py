"""Networks with connections that skip layers."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax.lab.tasks.models.layers import BATCH_NORM_MOMENTUM, Classifier, ConvNorm, max_pool


class ResNet(nn.Module):
    """A residual network with one block of two convolutions per stage (He et al., CVPR 2016).

    Every stage but the first halves height and width, and its shortcut is a 1x1 convolution.

    Attributes:
      num_classes: number of logits.
      features: channels of each stage.
      stem_strides: of the convolution before the first stage, on both axes.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32)
    stem_strides: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=BATCH_NORM_MOMENTUM)
        x = nn.relu(norm()(conv(self.features[0], (3, 3), self.stem_strides)(images)))
        for index, features in enumerate(self.features):
            strides = 1 if index == 0 else 2
            branch = nn.relu(norm()(conv(features, (3, 3), strides)(x)))
            branch = norm()(conv(features, (3, 3))(branch))
            if index > 0:
                x = norm()(conv(features, (1, 1), strides)(x))
            x = nn.relu(x + branch)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class DenseNet(nn.Module):
    """Every layer is given the outputs of all layers before it (Huang et al., CVPR 2017).

    Attributes:
      num_classes: number of logits.
      growth: channels that each layer adds.
      layers: number of layers of each stage.
    """

    num_classes: int = 10
    growth: int = 8
    layers: Sequence[int] = (3, 3)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(2 * self.growth, strides=2)(images, train=train)
        for stage, num_layers in enumerate(self.layers):
            if stage > 0:
                x = max_pool(ConvNorm(x.shape[-1] // 2, kernel=1)(x, train=train))
            for _ in range(num_layers):
                x = jnp.concatenate([x, ConvNorm(self.growth)(x, train=train)], axis=-1)
        return Classifier(self.num_classes)(x)
