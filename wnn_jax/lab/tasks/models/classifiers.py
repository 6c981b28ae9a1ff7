"""Networks that map images `[n, height, width, channels]` to logits `[n, num_classes]`.

`features` are the channels of each convolution, stage or block.
"""

# ruff: noqa: D102 - the lines above say what every `__call__` does.

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

_BATCH_NORM_MOMENTUM = 0.9


def max_pool(images: jax.Array) -> jax.Array:
    """Max-pool 2x2 pixels of `[n, height, width, channels]`, and drop an odd last row or column.

    The result is that of `nn.max_pool`, whose gradient is slow on CPU.
    """
    batch, height, width, channels = images.shape
    images = images[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(images.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation and, if `relu`, a ReLU. `depthwise` is one window a channel."""

    features: int
    kernel: int = 3
    strides: int = 1
    depthwise: bool = False
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        groups = x.shape[-1] if self.depthwise else 1
        window = (self.kernel, self.kernel)
        x = nn.Conv(self.features, window, strides=self.strides, feature_group_count=groups, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=_BATCH_NORM_MOMENTUM)(x)
        return nn.relu(x) if self.relu else x


class Classifier(nn.Module):
    """The mean over all positions and a dense layer: the end of most networks."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Dense layers with ReLUs between them. `widths` are the features of the hidden layers."""

    num_classes: int = 10
    widths: Sequence[int] = (64,)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class VanillaCNN(nn.Module):
    """Convolutions with max-pooling after each, dense layers of `hidden` features, and a classifier.

    With the defaults it is the "vanilla CNN" of Jang et al., ICML 2023.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32, 32)
    hidden: Sequence[int] = (64,)
    window: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for features in self.features:
            x = max_pool(nn.relu(nn.Conv(features, (self.window, self.window))(x)))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class ThreeConv(nn.Module):
    """3x3 convolutions, global average pooling and a classifier. The first has stride 2 and no padding.

    With the defaults it is the network of the tasks C10/16 and FM/16 of Knyazev et al., ICLR 2025.
    """

    num_classes: int = 10
    features: Sequence[int] = (16, 32, 32)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.features[0], (3, 3), strides=2, padding="VALID")(images))
        for features in self.features[1:]:
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class VGG(nn.Module):
    """Pairs of convolutions with max-pooling after each pair (Simonyan and Zisserman, ICLR 2015)."""

    num_classes: int = 10
    features: Sequence[int] = (12, 24)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for features in self.features:
            x = ConvNorm(features)(x, train=train)
            x = max_pool(ConvNorm(features)(x, train=train))
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))


class ResNet(nn.Module):
    """A residual network with one block of two convolutions per stage (He et al., CVPR 2016).

    Every stage but the first halves height and width, and its shortcut is a 1x1 convolution. The convolution before
    the first stage has the strides `stem_strides`.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 16, 32)
    stem_strides: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=_BATCH_NORM_MOMENTUM)
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
    """A network in which every layer sees the outputs of all earlier ones (Huang et al., CVPR 2017).

    Each layer adds `growth` channels. `layers` are the numbers of layers of the stages.
    """

    num_classes: int = 10
    growth: int = 8
    layers: Sequence[int] = (3, 3)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = ConvNorm(2 * self.growth, strides=2)(images, train=train)
        for stage, num_layers in enumerate(self.layers):
            if stage > 0:
                x = max_pool(ConvNorm(x.shape[-1] // 2, kernel=1)(x, train=train))
            for _ in range(num_layers):
                x = jnp.concatenate([x, ConvNorm(self.growth)(x, train=train)], axis=-1)
        return Classifier(self.num_classes)(x)


class MobileNetV2(nn.Module):
    """Inverted residual blocks: expand the channels, filter depthwise, project (Sandler et al., CVPR 2018).

    `expansion` says how many times more channels the depthwise convolutions have.
    """

    num_classes: int = 10
    features: Sequence[int] = (8, 12, 16)
    expansion: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
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
    """Blocks that filter half of the channels depthwise and then shuffle all of them (Ma et al., ECCV 2018).

    `features` is an even number of channels, the same in all blocks.
    """

    num_classes: int = 10
    features: int = 24
    num_blocks: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = ConvNorm(self.features, strides=2)(images, train=train)
        half = self.features // 2
        for _ in range(self.num_blocks):
            passed, x = jnp.split(x, 2, axis=-1)
            x = ConvNorm(half, kernel=1)(x, train=train)
            x = ConvNorm(half, depthwise=True, relu=False)(x, train=train)
            x = ConvNorm(half, kernel=1)(x, train=train)
            x = jnp.stack([passed, x], axis=-1).reshape(*x.shape[:-1], self.features)
        return Classifier(self.num_classes)(ConvNorm(48, kernel=1)(x, train=train))
