"""Readers of other projects' weight files. They need the `convert` extra: `pip install 'wnn-jax[convert]'`."""

from wnn_jax.convert.keras_wnn import keras_wnn as keras_wnn
from wnn_jax.convert.nino import nino as nino
from wnn_jax.convert.nino import nino_mlp as nino_mlp
