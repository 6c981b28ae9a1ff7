"""A linear extrapolation whose coefficients a network chooses, weight by weight."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax.nowcasters._moments import Moments, log_ratio, ratio
from wnn_jax.nowcasters._multi_horizon import CONTEXT, ChunkedNowcaster, HorizonNetwork, scale_of

_NUM_CHANGES = CONTEXT - 1
_NUM_LAGS = _NUM_CHANGES - 1


class ChangeStatistics(NamedTuple):
    """How a tensor moves.

    Attributes:
      mean: of all its values.
      std: of all its values.
      rms: scalars, the root mean square of the changes from each snapshot to the next.
      correlations: scalars, of changes that are 1, 2, ... snapshots apart: 1 for a straight path, 0 for a random walk,
        negative for weights that go to and fro.
    """

    mean: Any
    std: Any
    rms: tuple[Any, ...]
    correlations: tuple[Any, ...]


class CoefficientNetwork(HorizonNetwork):
    """Chooses the coefficients of a weight's changes, for every horizon."""

    num_inputs = 2 * _NUM_CHANGES + _NUM_LAGS + 3
    outputs_per_horizon = (_NUM_CHANGES,)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdaptiveLinear(ChunkedNowcaster):
    r"""A linear extrapolation with coefficients that a network chooses.

    Let :math:`c_1, \dots, c_4` be the changes of a weight from each of its last 5 snapshots to the next. Its forecast
    `k` snapshots ahead is its last value plus :math:`\sum_t a_{k,t} c_t`. The linear fit has the same coefficients for
    all weights, and forecasts too far where the history is noise. Here a network chooses them for every weight from
    the form of its own history, the size of its changes beside those of its tensor, its tensor's statistics (is the
    path of these weights straight, or do they go to and fro? do they slow down?), and its role.

    Nothing that the network is given depends on the scale of the weights or of their changes; a weight that did not
    move stays; and far from anything that was trained on the forecast is still a combination of recent changes.

    Attributes:
      params: the parameters of its network.
      default_horizon: how many snapshots ahead it forecasts where `horizon` is `None`.
      chunk_size: how many weights go through the network at a time, which bounds the working memory: at most 1 KiB
        for each of them. `None`: 8192 on CPU, 131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, or `default_horizon` is not one that it forecasts.
    """

    network_class: ClassVar[type[HorizonNetwork]] = CoefficientNetwork

    @staticmethod
    def summarize(moments: Moments) -> ChangeStatistics:
        """How tensors move, from their moments."""
        squares = [change / moments.count for change in moments.changes]
        mean_square = sum(squares) / _NUM_CHANGES
        return ChangeStatistics(
            *scale_of(moments),
            rms=tuple(moments.unit * square**0.5 for square in squares),
            correlations=tuple(
                lagged / ((_NUM_CHANGES - lag) * moments.count * (mean_square + (mean_square == 0)))
                for lag, lagged in enumerate(moments.lagged, start=1)
            ),
        )

    def changes(
        self, history: tuple[jax.Array, ...], statistics: ChangeStatistics, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecasts how far weights of one tensor will have moved; see `MultiHorizonNowcaster.changes`."""
        values = jnp.stack(history, axis=-1)
        changes = values[:, 1:] - values[:, :-1]
        inputs = _inputs(values[:, -1], changes, statistics).astype(jnp.float32)
        coefficients = self.network.apply({"params": self.params}, inputs, role, horizon)
        assert isinstance(coefficients, jax.Array)
        if horizon is None:
            changes = changes[:, None]
        return (coefficients * changes).sum(axis=-1)


def _inputs(last: jax.Array, changes: jax.Array, statistics: ChangeStatistics) -> jax.Array:
    """What the network is given of each weight: `[n, num_inputs]`, of the order of 1."""
    tensor_rms = _root_mean_square(jnp.stack(statistics.rms, axis=-1))
    size = _root_mean_square(changes)
    of_weight = [
        *jnp.unstack(ratio(changes, size[:, None]), axis=-1),
        log_ratio(size, tensor_rms),
        jnp.clip(ratio(last - statistics.mean, statistics.std), -5.0, 5.0),
    ]
    of_tensor = [
        log_ratio(tensor_rms, statistics.std),
        *(log_ratio(rms, tensor_rms) for rms in statistics.rms),
        *statistics.correlations,
    ]
    return jnp.stack([*of_weight, *(jnp.broadcast_to(value, last.shape) for value in of_tensor)], axis=-1)


def _root_mean_square(values: jax.Array) -> jax.Array:
    """Over the last axis; no square overflows or vanishes."""
    largest = jnp.max(jnp.abs(values), axis=-1)
    return largest * jnp.sqrt(jnp.mean(ratio(values, largest[..., None]) ** 2, axis=-1))
