"""Weight nowcasting for JAX and Optax: train in fewer steps by forecasting where the weights are going."""

from importlib import metadata as _metadata

from wnn_jax import averaging as averaging
from wnn_jax import convert as convert
from wnn_jax import late_phase as late_phase
from wnn_jax import nowcasters as nowcasters
from wnn_jax._nowcast import NowcastState as NowcastState
from wnn_jax._nowcast import metrics as metrics
from wnn_jax._nowcast import nowcast as nowcast
from wnn_jax._roles import default_roles as default_roles
from wnn_jax._store import available as available
from wnn_jax._store import load as load
from wnn_jax._store import save as save
from wnn_jax._window import Nowcaster as Nowcaster
from wnn_jax._window import decaying_horizon as decaying_horizon
from wnn_jax._window import leafwise as leafwise

try:
    __version__ = _metadata.version("wnn-jax")
except _metadata.PackageNotFoundError:  # A clone that is on the path, but not installed.
    __version__ = "0+unknown"
