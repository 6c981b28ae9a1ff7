"""Averages of weights along a training: uniform, of the latest, exponential, and trained (TWA)."""

from wnn_jax.averaging._batch_stats import update_batch_stats as update_batch_stats
from wnn_jax.averaging._history import WeightHistory as WeightHistory
from wnn_jax.averaging._make_subspace import make_subspace as make_subspace
from wnn_jax.averaging._subspace import Subspace as Subspace
from wnn_jax.averaging._subspace import averaging_coefficients as averaging_coefficients
from wnn_jax.averaging._subspace import combine as combine
from wnn_jax.averaging._subspace import init_coefficients as init_coefficients
from wnn_jax.averaging._subspace import project_onto_subspace as project_onto_subspace
from wnn_jax.averaging._transforms import ema as ema
from wnn_jax.averaging._transforms import ema_eval_params as ema_eval_params
from wnn_jax.averaging._transforms import lawa as lawa
from wnn_jax.averaging._transforms import lawa_eval_params as lawa_eval_params
from wnn_jax.averaging._transforms import uniform as uniform
from wnn_jax.averaging._transforms import uniform_eval_params as uniform_eval_params
