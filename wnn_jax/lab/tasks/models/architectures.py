"""The table of networks by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from wnn_jax.lab.tasks.models.convolutional import VGG, ThreeConv, VanillaCNN
from wnn_jax.lab.tasks.models.mlp import MLP
from wnn_jax.lab.tasks.models.residual import DenseNet, ResNet
from wnn_jax.lab.tasks.models.separable import MobileNetV2, ShuffleNetV2
from wnn_jax.lab.tasks.models.transformer import TransformerLM

_Constructor = Callable[[int], nn.Module]


def _transformer(num_layers: int, width: int) -> _Constructor:
    return lambda vocab_size: TransformerLM(vocab_size, width=width, num_layers=num_layers)


def _mlp(*widths: int) -> _Constructor:
    return lambda num_classes: MLP(num_classes, widths)


def _vanilla(*features: int, hidden: Sequence[int] = (), window: int = 3) -> _Constructor:
    return lambda num_classes: VanillaCNN(num_classes, features, hidden, window)


def _three_conv(*features: int) -> _Constructor:
    return lambda num_classes: ThreeConv(num_classes, features)


_LANGUAGE_MODELS: dict[str, _Constructor] = {
    "transformer-1x32": _transformer(1, 32),
    "transformer-2x24": _transformer(2, 24),
    "transformer-2x32": _transformer(2, 32),
}

LANGUAGE_MODELS = frozenset(_LANGUAGE_MODELS)

# Name -> constructor, given the number of classes or of different tokens.
ARCHITECTURES: Mapping[str, Callable[[int], Any]] = {
    "mlp-64": _mlp(64),
    "mlp-128-64": _mlp(128, 64),
    "cnn-8-16": _vanilla(8, 16),
    "cnn-16-32": _vanilla(16, 32),
    "cnn-8-16-32": _vanilla(8, 16, 32, hidden=(32,)),
    "cnn-16-16-32": _vanilla(16, 16, 32, hidden=(64,)),
    "lenet": _vanilla(6, 16, hidden=(84,), window=5),
    "three-conv-8-16-16": _three_conv(8, 16, 16),
    "three-conv-12-16-32": _three_conv(12, 16, 32),
    "three-conv-12-24-24": _three_conv(12, 24, 24),
    "three-conv-24-24-48": _three_conv(24, 24, 48),
    "vgg": VGG,
    "resnet": lambda num_classes: ResNet(num_classes, (12, 24), stem_strides=2),
    "mobilenet-v2": MobileNetV2,
    "shufflenet-v2": ShuffleNetV2,
    "densenet": DenseNet,
    **_LANGUAGE_MODELS,
}
