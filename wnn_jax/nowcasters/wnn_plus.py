"""WNN+: one network for all kinds of operation and for many horizons at once."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from wnn_jax.nowcasters._moments import Moments
from wnn_jax.nowcasters._multi_horizon import ChunkedNowcaster, HorizonNetwork, Scale, normalize, scale_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WNNPlus(ChunkedNowcaster):
    """The multi-horizon nowcaster WNN+, the plain network beside NiNo.

    One network forecasts every scalar weight from its own last 5 snapshots, any number of snapshots up to 40 ahead.
    The history of each tensor is first brought to mean 0 and standard deviation 1; the network is told the role.

    Attributes:
      params: the parameters of its network.
      default_horizon: how many snapshots ahead it forecasts where `horizon` is `None`.
      chunk_size: how many weights go through the network at a time, which bounds the working memory: at most 1 KiB
        for each of them. `None`: 8192 on CPU, 131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, or `default_horizon` is not one that it forecasts.

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """

    network_class: ClassVar[type[HorizonNetwork]] = HorizonNetwork

    @staticmethod
    def summarize(moments: Moments) -> Scale:
        """Mean and standard deviation of the history of tensors."""
        return scale_of(moments)

    def changes(
        self, history: tuple[jax.Array, ...], statistics: Scale, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecasts how far weights of one tensor will have moved; see `MultiHorizonNowcaster.changes`."""
        values = jnp.stack([normalize(snapshot, statistics) for snapshot in history], axis=-1)
        change = self.network.apply({"params": self.params}, values.astype(jnp.float32), role, horizon)
        assert isinstance(change, jax.Array)
        if horizon is None:
            std, mean = (
                jnp.broadcast_to(value, history[0].shape)[:, None] for value in (statistics.std, statistics.mean)
            )
            return (values[:, -1:] + change) * std + mean - history[-1][:, None]
        return (values[:, -1] + change) * statistics.std + statistics.mean - history[-1]
