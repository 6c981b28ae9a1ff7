"""The kinds of nowcasters that can be trained: their first parameters, their loss and their optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.forecasting.windows import CONTEXT, NUM_HORIZONS, Window, WindowBatch
from wnn_jax.nowcasters import WNN, PooledLinear, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster
from wnn_jax.nowcasters.wnn import TwoStreamNetwork, normalize


@dataclasses.dataclass(frozen=True)
class NowcasterKind:
    """A kind of nowcaster that can be trained. Add your own to `KINDS`.

    Attributes:
      nowcaster: the class of the nowcaster: `(params, *, record) -> Nowcaster`.
      horizons: all horizons that it forecasts, in snapshots.
      init: `(key, roles) -> params`, the first parameters for weights of these roles.
      statistics: see `WindowSampler`.
      changes: `(params, batch) -> changes`, how far weights move from their last snapshot: `[batch, 40 or 1, n]`.
      optimizer: `(learning_rate, num_steps) -> GradientTransformation`.
      own_loss: `(params, batch) -> loss`. Default: the mean of `errors`, by which all horizons and tensors count alike.
    """

    nowcaster: Callable[..., Any]
    horizons: range
    init: Callable[[jax.Array, tuple[str, ...]], Any]
    statistics: Callable[[Any, Any], Any]
    changes: Callable[[Any, WindowBatch], jax.Array]
    optimizer: Callable[[float, int], optax.GradientTransformation]
    own_loss: Callable[[Any, WindowBatch], jax.Array] | None = None

    def loss(self, params: Any, batch: WindowBatch) -> jax.Array:
        """Return the training loss of a batch."""
        return self.own_loss(params, batch) if self.own_loss else jnp.nanmean(self.errors(params, batch))

    def errors(self, params: Any, batch: WindowBatch) -> jax.Array:
        """Return forecast errors relative to forecasting no change.

        Returns:
          `[batch, 40]`: the sum of absolute errors over the weights of a window, divided by the same sum for no change.
          NaN where `is_known` is false.
        """
        actual = batch.windows.targets - batch.windows.history[:, -1:]
        error = jnp.abs(self.changes(params, batch) - actual).sum(axis=-1)
        is_known = self.is_known(batch.windows)
        return jnp.where(is_known, error / jnp.where(is_known, jnp.abs(actual).sum(axis=-1), 1.0), jnp.nan)

    def is_known(self, windows: Window) -> jax.Array:
        """Return `[batch, 40]` bool: whether a horizon is forecast, the run reaches it, and something moved."""
        moved = jnp.abs(windows.targets - windows.history[:, -1:]).sum(axis=-1) > 1e-12
        return windows.is_known & moved & np.isin(np.arange(1, NUM_HORIZONS + 1), self.horizons)[None]


def multi_horizon_kind(nowcaster_class: type[MultiHorizonNowcaster], **sizes: int) -> NowcasterKind:
    """Return the kind of a nowcaster for all horizons, with the optimizer of Knyazev et al., ICLR 2025."""

    def changes(params: Any, batch: WindowBatch) -> jax.Array:
        nowcaster = nowcaster_class(params)
        return jax.vmap(lambda each: nowcaster.changes(tuple(each.history), each.statistics, each.role).T)(
            batch.windows
        )

    def optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=min(1e-6 / learning_rate, 1.0))
        return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-2))

    return NowcasterKind(
        nowcaster=nowcaster_class,
        horizons=range(1, NUM_HORIZONS + 1),
        init=lambda key, roles: nowcaster_class.init(key, **sizes).params,
        statistics=nowcaster_class.statistics_of,
        changes=changes,
        optimizer=optimizer,
    )


def _wnn_changes(params: Any, batch: WindowBatch) -> jax.Array:
    nowcaster = WNN(params)
    changes: list[jax.Array] = []
    for role, windows in batch.by_role().items():
        history = tuple(jnp.moveaxis(windows.history, 1, 0))
        changes.append(nowcaster([{role: snapshot} for snapshot in history], {role: role})[role] - history[-1])
    stacked = jnp.stack(changes, axis=1)
    return stacked.reshape(-1, 1, stacked.shape[-1])


def _wnn_loss(params: Any, batch: WindowBatch) -> jax.Array:
    """Return the loss of Jang et al. (ICML 2023): L1 in normalised units, and the regularisation of their code."""
    losses: list[jax.Array] = []
    for role, windows in batch.by_role().items():
        values, first, span = normalize(tuple(jnp.moveaxis(windows.history, 1, 0).reshape(CONTEXT, -1)))
        change = TwoStreamNetwork().apply({"params": params[role]}, values.T)
        assert isinstance(change, jax.Array)
        target = (windows.targets[:, WNN.default_horizon - 1].reshape(-1) - first) / span
        # A weight that did not move has no range to be normalised by.
        moved = jnp.ptp(values, axis=0) > 0.1
        error = jnp.abs(values[-1] + change - target)
        streams = (params[role][stream].items() for stream in ("values", "differences"))
        layers = [layer for stream in streams for name, layer in stream if name != "squeeze"]
        kernels = sum(jnp.abs(layer["kernel"]).sum() for layer in layers)
        biases = sum(jnp.abs(layer["bias"]).sum() for layer in layers)
        mean_error = jnp.sum(error * moved) / jnp.maximum(jnp.sum(moved), 1)
        losses.append(mean_error + (1e-6 * kernels + 0.1 * biases))
    return jnp.stack(losses).mean()


KINDS: Mapping[str, NowcasterKind] = {
    "wnn": NowcasterKind(
        nowcaster=WNN,
        horizons=range(WNN.default_horizon, WNN.default_horizon + 1),
        init=lambda key, roles: WNN.init(key, roles).params,
        statistics=lambda history, chosen: (),
        changes=_wnn_changes,
        optimizer=lambda learning_rate, num_steps: optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps)),
        own_loss=_wnn_loss,
    ),
    "wnn-plus": multi_horizon_kind(WNNPlus, width=128),
    "pooled-linear": multi_horizon_kind(PooledLinear, width=64, num_hidden=2),
}
