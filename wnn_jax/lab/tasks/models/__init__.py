"""Small networks, to train nowcasters on and to compare methods with.

Most map images `[n, height, width, channels]` to logits `[n, num_classes]`, and `features` are the channels of each
convolution, stage or block. Language models map tokens `[n, length]` to logits `[n, length, vocab_size]`. Networks with
batch normalisation take a keyword `train` and have a collection `batch_stats`. The others have neither.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_BATCH_NORM_MOMENTUM = 0.9


def max_pool(images: jax.Array) -> jax.Array:
    """Max-pool 2x2 pixels, and drop an odd last row or column, as `nn.max_pool`, whose gradient is slow on CPU."""
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
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=_BATCH_NORM_MOMENTUM)
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
    """Stages of `layers`; every layer sees the outputs of all earlier ones (Huang et al., CVPR 2017)."""

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
    """Inverted residual blocks: expand the channels, filter depthwise, project (Sandler et al., CVPR 2018)."""

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
    """Blocks that filter half of the channels depthwise and then shuffle all of them (Ma et al., ECCV 2018)."""

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


class TransformerLM(nn.Module):
    """A small decoder-only transformer in the style of GPT-2: LayerNorm first, learned positions, GELU."""

    vocab_size: int
    width: int = 32
    num_layers: int = 1
    num_heads: int = 4
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"tokens has sequences of {length} tokens; set max_length={self.max_length} to as many.")
        positions = nn.Embed(self.max_length, self.width, name="wpe")(jnp.arange(length))
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))


class LSTM(nn.Module):
    """One recurrent layer of `width` features, from a state of zeros (Hochreiter and Schmidhuber, 1997)."""

    vocab_size: int
    width: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens)
        return nn.Dense(self.vocab_size)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))


# Name -> constructor, given the number of classes or of different tokens.
ARCHITECTURES: Mapping[str, Callable[[int], Any]] = {
    "mlp-64": partial(MLP, widths=(64,)),
    "mlp-128-64": partial(MLP, widths=(128, 64)),
    "cnn-8-16": partial(VanillaCNN, features=(8, 16), hidden=()),
    "cnn-16-32": partial(VanillaCNN, features=(16, 32), hidden=()),
    "cnn-8-16-32": partial(VanillaCNN, features=(8, 16, 32), hidden=(32,)),
    "cnn-16-16-32": partial(VanillaCNN, features=(16, 16, 32), hidden=(64,)),
    "lenet": partial(VanillaCNN, features=(6, 16), hidden=(84,), window=5),
    "three-conv-8-16-16": partial(ThreeConv, features=(8, 16, 16)),
    "three-conv-12-16-32": partial(ThreeConv, features=(12, 16, 32)),
    "three-conv-12-24-24": partial(ThreeConv, features=(12, 24, 24)),
    "three-conv-24-24-48": partial(ThreeConv, features=(24, 24, 48)),
    "vgg": VGG,
    "resnet": partial(ResNet, features=(12, 24), stem_strides=2),
    "mobilenet-v2": MobileNetV2,
    "shufflenet-v2": ShuffleNetV2,
    "densenet": DenseNet,
    "transformer-1x32": partial(TransformerLM, width=32, num_layers=1),
    "transformer-2x24": partial(TransformerLM, width=24, num_layers=2),
    "transformer-2x32": partial(TransformerLM, width=32, num_layers=2),
}


def train_option(model: nn.Module, *, train: bool) -> dict[str, Any]:
    """Return the keyword `train` for a network that behaves differently in training, and none for the others."""
    return {"train": train} if "train" in inspect.signature(model.__call__).parameters else {}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe a network by its class and its attributes, as JSON."""
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    description = {"class": type(model).__name__} | {name: getattr(model, name) for name in fields}
    return json.loads(json.dumps(description, default=repr))
