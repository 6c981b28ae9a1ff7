"""The predictors, one per file."""

from wnn_jax.nowcasters.adaptive_linear import AdaptiveLinear as AdaptiveLinear
from wnn_jax.nowcasters.curve_fit import CURVES as CURVES
from wnn_jax.nowcasters.curve_fit import CurveFit as CurveFit
from wnn_jax.nowcasters.wnn import WNN as WNN
from wnn_jax.nowcasters.wnn_plus import WNNPlus as WNNPlus
