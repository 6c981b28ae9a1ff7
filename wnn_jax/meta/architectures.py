"""Small networks of many kinds, whose training a nowcaster learns from and is judged by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def max_pool(images: jax.Array) -> jax.Array:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped.

    The same as `nn.max_pool`, whose gradient is slow on CPU.
    """
    batch, height, width, channels = images.shape
    images = images[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(images.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the batch at hand, in training and in evaluation: it keeps none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., channels]` to the same shape."""
        shape = x.shape[-1:]
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        axes = tuple(range(x.ndim - 1))
        normalized = nn.standardize(x, axis=axes, epsilon=1e-5)
        return normalized * jnp.expand_dims(scale, axes) + jnp.expand_dims(bias, axes)


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm and, by custom, ReLU.

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
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, height, width, channels]` to `[n, ceil(height / strides), ..., features]`."""
        groups = x.shape[-1] if self.depthwise else 1
        window = (self.kernel, self.kernel)
        x = nn.Conv(self.features, window, strides=self.strides, feature_group_count=groups, use_bias=False)(x)
        x = BatchNorm()(x)
        return nn.relu(x) if self.relu else x


class Classifier(nn.Module):
    """What ends most networks: the mean over all positions, and a dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, height, width, channels]` to logits `[n, num_classes]`."""
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Dense layers with ReLUs between."""

    num_classes: int
    widths: Sequence[int] = (64,)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class VanillaCNN(nn.Module):
    """Convolutions with max-pooling after each, a hidden dense layer and a classifier.

    With the defaults, the "vanilla CNN" of Jang et al., ICML 2023.
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
    """Pairs of convolutions with BatchNorm, max-pooling after each pair (Simonyan and Zisserman, ICLR 2015)."""

    num_classes: int
    features: Sequence[int] = (12, 24)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images
        for features in self.features:
            x = max_pool(ConvNorm(features)(ConvNorm(features)(x)))
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))


class ResNet(nn.Module):
    """Residual blocks of two convolutions (He et al., CVPR 2016)."""

    num_classes: int
    features: Sequence[int] = (12, 24)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(self.features[0], strides=2)(images)
        for index, features in enumerate(self.features):
            strides = 1 if index == 0 else 2
            residual = ConvNorm(features, relu=False)(ConvNorm(features, strides=strides)(x))
            if strides > 1:
                x = ConvNorm(features, kernel=1, strides=strides, relu=False)(x)
            x = nn.relu(x + residual)
        return Classifier(self.num_classes)(x)


class MobileNetV2(nn.Module):
    """Inverted residual blocks: expand, filter depthwise, project (Sandler et al., CVPR 2018)."""

    num_classes: int
    features: Sequence[int] = (8, 12, 16)
    expansion: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(8, strides=2)(images)
        for features in self.features:
            hidden = x.shape[-1] * self.expansion
            strides = 1 if features == x.shape[-1] else 2
            block = ConvNorm(hidden, strides=strides, depthwise=True)(ConvNorm(hidden, kernel=1)(x))
            block = ConvNorm(features, kernel=1, relu=False)(block)
            x = x + block if strides == 1 else block
        return Classifier(self.num_classes)(ConvNorm(48, kernel=1)(x))


class ShuffleNetV2(nn.Module):
    """Half of the channels pass by, half are filtered depthwise, all are shuffled (Ma et al., ECCV 2018)."""

    num_classes: int
    features: int = 24
    num_blocks: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(self.features, strides=2)(images)
        half = self.features // 2
        for _ in range(self.num_blocks):
            passed, x = jnp.split(x, 2, axis=-1)
            x = ConvNorm(half, depthwise=True, relu=False)(ConvNorm(half, kernel=1)(x))
            x = ConvNorm(half, kernel=1)(x)
            x = jnp.stack([passed, x], axis=-1).reshape(*x.shape[:-1], self.features)
        return Classifier(self.num_classes)(ConvNorm(48, kernel=1)(x))


class DenseNet(nn.Module):
    """Every layer is given the outputs of all before it (Huang et al., CVPR 2017)."""

    num_classes: int
    growth: int = 8
    layers: Sequence[int] = (3, 3)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = ConvNorm(2 * self.growth, strides=2)(images)
        for block, num_layers in enumerate(self.layers):
            if block:
                x = max_pool(ConvNorm(x.shape[-1] // 2, kernel=1)(x))
            for _ in range(num_layers):
                x = jnp.concatenate([x, ConvNorm(self.growth)(x)], axis=-1)
        return Classifier(self.num_classes)(x)


class TransformerLM(nn.Module):
    """A small decoder-only transformer in the style of GPT-2: LayerNorm first, learned positions, GELU.

    Attributes:
      vocab_size: number of different tokens.
      width: features of every position.
      num_layers: blocks of attention and MLP.
      num_heads: attention heads.
      max_length: the longest sequence.
    """

    vocab_size: int
    width: int = 32
    num_layers: int = 1
    num_heads: int = 4
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[n, length]` to the logits of the next ones, `[n, length, vocab_size]`."""
        positions = nn.Embed(self.max_length, self.width, name="wpe")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))


def _transformer(num_layers: int, width: int) -> Callable[[int], nn.Module]:
    return lambda vocab_size: TransformerLM(vocab_size, width=width, num_layers=num_layers)


def _vanilla(*features: int, hidden: Sequence[int] = (), window: int = 3) -> Callable[[int], nn.Module]:
    return lambda num_classes: VanillaCNN(num_classes, features, hidden, window)


_LANGUAGE_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "transformer-1x32": _transformer(1, 32),
    "transformer-2x24": _transformer(2, 24),
    "transformer-1x48": _transformer(1, 48),
}

LANGUAGE_MODELS = frozenset(_LANGUAGE_MODELS)

# Name -> constructor, given the number of classes or of different tokens.
ARCHITECTURES: Mapping[str, Callable[[int], Any]] = {
    "mlp-64": lambda num_classes: MLP(num_classes, (64,)),
    "mlp-128-64": lambda num_classes: MLP(num_classes, (128, 64)),
    "cnn-8-16": _vanilla(8, 16),
    "cnn-16-32": _vanilla(16, 32),
    "cnn-8-16-32": _vanilla(8, 16, 32, hidden=(32,)),
    "cnn-16-16-32": _vanilla(16, 16, 32, hidden=(64,)),
    "lenet": _vanilla(6, 16, hidden=(84,), window=5),
    "vanilla": _vanilla(8, 16, 32, 32, hidden=(64,)),
    "three-conv": ThreeConv,
    "three-conv-8-16-16": lambda num_classes: ThreeConv(num_classes, (8, 16, 16)),
    "three-conv-12-24-24": lambda num_classes: ThreeConv(num_classes, (12, 24, 24)),
    "three-conv-24-24-48": lambda num_classes: ThreeConv(num_classes, (24, 24, 48)),
    "vgg": VGG,
    "resnet": ResNet,
    "mobilenet-v2": MobileNetV2,
    "shufflenet-v2": ShuffleNetV2,
    "densenet": DenseNet,
    **_LANGUAGE_MODELS,
}
