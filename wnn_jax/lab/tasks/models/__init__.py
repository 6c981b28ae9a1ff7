"""Small networks of many kinds, whose training a nowcaster learns from and is judged by.

Networks with batch normalisation take a keyword `train` and have a collection `batch_stats`; the others take none.
"""

from wnn_jax.lab.tasks.models.architectures import ARCHITECTURES as ARCHITECTURES
from wnn_jax.lab.tasks.models.architectures import LANGUAGE_MODELS as LANGUAGE_MODELS
from wnn_jax.lab.tasks.models.convolutional import VGG as VGG
from wnn_jax.lab.tasks.models.convolutional import ThreeConv as ThreeConv
from wnn_jax.lab.tasks.models.convolutional import VanillaCNN as VanillaCNN
from wnn_jax.lab.tasks.models.describe import describe_model as describe_model
from wnn_jax.lab.tasks.models.describe import takes_train as takes_train
from wnn_jax.lab.tasks.models.layers import Classifier as Classifier
from wnn_jax.lab.tasks.models.layers import ConvNorm as ConvNorm
from wnn_jax.lab.tasks.models.layers import max_pool as max_pool
from wnn_jax.lab.tasks.models.mlp import MLP as MLP
from wnn_jax.lab.tasks.models.recurrent import LSTM as LSTM
from wnn_jax.lab.tasks.models.residual import DenseNet as DenseNet
from wnn_jax.lab.tasks.models.residual import ResNet as ResNet
from wnn_jax.lab.tasks.models.separable import MobileNetV2 as MobileNetV2
from wnn_jax.lab.tasks.models.separable import ShuffleNetV2 as ShuffleNetV2
from wnn_jax.lab.tasks.models.transformer import TransformerLM as TransformerLM
from wnn_jax.lab.tasks.models.unet import SegmentationUNet as SegmentationUNet
from wnn_jax.lab.tasks.models.unet import UNet as UNet
