"""Small networks of many kinds, to train nowcasters on and to compare methods with.

Networks with batch normalisation take a keyword `train` and have a collection `batch_stats`. The others have neither.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from wnn_jax.lab.tasks.models.classifiers import MLP as MLP
from wnn_jax.lab.tasks.models.classifiers import VGG as VGG
from wnn_jax.lab.tasks.models.classifiers import DenseNet as DenseNet
from wnn_jax.lab.tasks.models.classifiers import MobileNetV2 as MobileNetV2
from wnn_jax.lab.tasks.models.classifiers import ResNet as ResNet
from wnn_jax.lab.tasks.models.classifiers import ShuffleNetV2 as ShuffleNetV2
from wnn_jax.lab.tasks.models.classifiers import ThreeConv as ThreeConv
from wnn_jax.lab.tasks.models.classifiers import VanillaCNN as VanillaCNN
from wnn_jax.lab.tasks.models.language_models import LSTM as LSTM
from wnn_jax.lab.tasks.models.language_models import TransformerLM as TransformerLM
from wnn_jax.lab.tasks.models.unet import SegmentationUNet as SegmentationUNet
from wnn_jax.lab.tasks.models.unet import UNet as UNet

_LANGUAGE_MODELS = {
    "transformer-1x32": partial(TransformerLM, width=32, num_layers=1),
    "transformer-2x24": partial(TransformerLM, width=24, num_layers=2),
    "transformer-2x32": partial(TransformerLM, width=32, num_layers=2),
}
LANGUAGE_MODELS = frozenset(_LANGUAGE_MODELS)

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
    **_LANGUAGE_MODELS,
}


def takes_train(model: nn.Module) -> bool:
    """Whether the network takes a keyword `train`, because it behaves differently in training."""
    return "train" in inspect.signature(model.__call__).parameters


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The class and the attributes of a network as JSON."""
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    description = {"class": type(model).__name__} | {name: getattr(model, name) for name in fields}
    return json.loads(json.dumps(description, default=repr))
