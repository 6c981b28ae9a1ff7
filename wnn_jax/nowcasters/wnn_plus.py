"""WNN+: one network for all kinds of operation and for many horizons at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._leaves import LeafMap, check_chunk_size, finite_or_last
from wnn_jax.nowcasters._multi_horizon import HorizonNetwork, MultiHorizonNowcaster
from wnn_jax.nowcasters._scale import Scale, standardize


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WNNPlus(MultiHorizonNowcaster):
    """The multi-horizon nowcaster WNN+, the simpler of the two networks of the NiNo paper.

    One network forecasts every scalar weight from its own last 5 snapshots, any number of snapshots up to 40 ahead.
    The history of each tensor is first brought to mean 0 and standard deviation 1. The network is also given the role.

    Attributes:
      params: the parameters of its network.
      default_horizon: how many snapshots ahead it forecasts if `horizon` is `None`.
      chunk_size: how many weights go through the network at a time, at most 1 KiB of working memory each. `None`: 8192
        on CPU, 131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, or `default_horizon` is not one that it forecasts.

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """

    chunk_size: int | None = None

    network_class: ClassVar[type[HorizonNetwork]] = HorizonNetwork

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """See `MultiHorizonNowcaster.forecast_leaves`."""
        leaf_map = LeafMap(_forecast, self.chunk_size, needs_scale=True)
        return leaf_map(leaves, jax.tree.map(jnp.asarray, dict(self.params)), role, horizon)

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Scale:
        """Return NumPy scalars; see `MultiHorizonNowcaster.statistics`."""
        values = np.stack(history).astype(np.float64)
        dtype = wide_dtype(history[0])
        return Scale(values.mean().astype(dtype), values.std(ddof=1).astype(dtype))

    def changes(
        self, history: tuple[jax.Array, ...], statistics: Scale, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecast how far weights of one tensor will have moved; see `MultiHorizonNowcaster.changes`."""
        values = jnp.stack([standardize(snapshot, statistics) for snapshot in history], axis=-1)
        change = self.network.apply({"params": self.params}, values.astype(jnp.float32), role, horizon)
        assert isinstance(change, jax.Array)
        last, std, mean, before = (
            # Changes have an axis for horizons.
            jnp.broadcast_to(value, history[0].shape)[:, None] if horizon is None else value
            for value in (values[:, -1], statistics.std, statistics.mean, history[-1])
        )
        return (last + change) * std + mean - before


def _forecast(history: LeafHistory, scale: Scale, params: Any, role: jax.Array, horizon: jax.Array) -> jax.Array:
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    change = WNNPlus(params).changes(wide, scale, role, horizon)
    return finite_or_last(wide[-1] + change, history)
