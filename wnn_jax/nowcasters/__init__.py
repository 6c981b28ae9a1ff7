"""The predictors, one per file."""

from wnn_jax._drift import Drift
from wnn_jax.nowcasters.curve_fit import CURVES as CURVES
from wnn_jax.nowcasters.curve_fit import CurveFit as CurveFit
from wnn_jax.nowcasters.nino import NiNo as NiNo
from wnn_jax.nowcasters.nino import neural_graph as neural_graph
from wnn_jax.nowcasters.pooled_linear import PooledLinear as PooledLinear
from wnn_jax.nowcasters.wnn import WNN as WNN
from wnn_jax.nowcasters.wnn_plus import WNNPlus as WNNPlus

# The classes that can be saved, by the names in their files. Each is a dataclass whose fields make an equal nowcaster:
# `params`, if there is one, is a tree of weights, and all others are of types that JSON has.
CLASSES = {cls.__name__: cls for cls in (WNN, WNNPlus, NiNo, PooledLinear, CurveFit, Drift)}

# The nowcasters that have a name and need no file.
RULES = {"drift": Drift(), "slow-drift": Drift(spectral=False, gain=0.02), **{kind: CurveFit(kind) for kind in CURVES}}
