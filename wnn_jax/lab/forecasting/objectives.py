"""What each kind of nowcaster is trained to do."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from wnn_jax._window import Nowcaster
from wnn_jax.lab.forecasting.windows import NUM_HORIZONS, OFFSETS, Window, WindowBatch
from wnn_jax.nowcasters import WNN, AdaptiveLinear, Pooled, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster
from wnn_jax.nowcasters.wnn import TwoStreamNetwork, normalize


class Objective(Protocol):
    """A kind of nowcaster, and the loss that it is trained with.

    An implementation is a frozen dataclass: its `repr` tells a training from one with other settings.
    """

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the snapshots of its windows are, in spacings, from 0 on."""
        ...

    @property
    def horizons(self) -> range:
        """How many snapshots ahead it forecasts, all possibilities."""
        ...

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from, for weights of these roles."""
        ...

    def statistics(self, history: Any, chosen: Any) -> Any:
        """What the nowcaster is told of some weights of a tensor, beside their own history.

        Args:
          history: `[context, *shape]`, the snapshots of the tensor, oldest first.
          chosen: `[n]` ints, the weights, by their places in the flat tensor.

        Returns:
          A tree of arrays.
        """
        ...

    def loss(self, params: Any, batch: WindowBatch) -> jax.Array:
        """The training loss of a batch."""
        ...

    def errors(self, params: Any, batch: WindowBatch) -> jax.Array:
        """Forecast errors as a share of those of forecasting no change.

        Returns:
          `[batch, 40]`: sums of absolute errors over the weights of each window, divided; NaN at horizons that are not
          forecast, or that the run has not, or where nothing moved.
        """
        ...

    def optimizer(self, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        """What trains it."""
        ...

    def nowcaster(self, params: Any, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class MultiHorizonObjective:
    """The L1 loss over all horizons, each relative to the error of forecasting no change.

    Relative, so that all horizons, all tensors and all stages of training count alike, however little moves there.

    Attributes:
      nowcaster_class: what is trained.
      sizes: of its network.
    """

    nowcaster_class: type[MultiHorizonNowcaster]
    sizes: Mapping[str, int]

    # Not annotated, and so no field.
    offsets = OFFSETS

    @property
    def horizons(self) -> range:
        """From 1 to 40 snapshots ahead."""
        return range(1, NUM_HORIZONS + 1)

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from."""
        del roles
        return self.nowcaster_class.init(key, **self.sizes).params

    def statistics(self, history: Any, chosen: Any) -> Any:
        """What the nowcaster is told of some weights of a tensor, beside their own history."""
        return self.nowcaster_class.statistics_of(history, chosen)

    def loss(self, params: Any, batch: WindowBatch) -> jax.Array:
        """Absolute errors summed over the weights of a window, over those of no change; then the mean."""
        return jnp.nanmean(self.errors(params, batch))

    def errors(self, params: Any, batch: WindowBatch) -> jax.Array:
        """See `Objective.errors`."""
        nowcaster = self.nowcaster_class(params)

        def changes(window: Window) -> jax.Array:
            return nowcaster.changes(tuple(window.history), window.statistics, window.role).T

        return _relative_errors(jax.vmap(changes)(batch.windows), batch.windows)

    def optimizer(self, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        """See `multi_horizon_optimizer`."""
        return multi_horizon_optimizer(learning_rate, num_steps)

    def nowcaster(self, params: Any, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        return self.nowcaster_class(params, record=record)


@dataclasses.dataclass(frozen=True)
class WNNObjective:
    """The paper's: L1 in normalised units, 5 snapshots ahead, and L1 regularisation.

    References:
      Jang et al., ICML 2023, with the constants of the published code.
    """

    # Not annotated, and so no fields. The published WNN forecasts "about 5 snapshots ahead".
    offsets = OFFSETS
    horizons = range(WNN.default_horizon, WNN.default_horizon + 1)

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from: one network per role."""
        return WNN.init(key, roles).params

    def statistics(self, history: Any, chosen: Any) -> Any:
        """Nothing: every weight is normalised by its own history."""
        del history, chosen
        return ()

    def loss(self, params: Any, batch: WindowBatch) -> jax.Array:
        """Mean absolute error of the normalised forecast, plus the regularisation."""
        losses: list[jax.Array] = []
        for role, windows in batch.by_role().items():
            history = tuple(jnp.moveaxis(windows.history, 1, 0).reshape(len(self.offsets), -1))
            values, first, span = normalize(history)
            change = TwoStreamNetwork().apply({"params": params[role]}, values.T)
            assert isinstance(change, jax.Array)
            target = (windows.targets[:, WNN.default_horizon - 1].reshape(-1) - first) / span
            # A weight that did not move has no range to be normalised by.
            moved = jnp.ptp(values, axis=0) > 0.1
            error = jnp.abs(values[-1] + change - target)
            losses.append(jnp.sum(error * moved) / jnp.maximum(jnp.sum(moved), 1) + _regularization(params[role]))
        return jnp.stack(losses).mean()

    def errors(self, params: Any, batch: WindowBatch) -> jax.Array:
        """See `Objective.errors`."""
        nowcaster = WNN(params)
        parts: list[jax.Array] = []
        for role, windows in batch.by_role().items():
            history = tuple(jnp.moveaxis(windows.history, 1, 0))
            change = nowcaster([{role: x} for x in history], {role: role})[role] - history[-1]
            parts.append(_errors_at(WNN.default_horizon, change, windows))
        return jnp.stack(parts, axis=1).reshape(-1, NUM_HORIZONS)

    def optimizer(self, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        """Adam, decayed to 0 over the training."""
        return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def nowcaster(self, params: Any, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        return WNN(params, record=record)


def multi_horizon_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """What Knyazev et al. (ICLR 2025) train WNN+ and NiNo with."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=min(1e-6 / learning_rate, 1.0))
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-2))


def _regularization(network: Any) -> jax.Array:
    wide = [
        layer for stream in ("values", "differences") for name, layer in network[stream].items() if name != "squeeze"
    ]
    kernels = sum(jnp.abs(layer["kernel"]).sum() for layer in wide)
    biases = sum(jnp.abs(layer["bias"]).sum() for layer in wide)
    return jnp.asarray(1e-6 * kernels + 0.1 * biases)


def known_changes(windows: Window) -> jax.Array:
    """`[batch, 40]` bool: where the run goes on that far, and something moved, so that an error has a scale."""
    return windows.is_known & (_no_change(windows) > 1e-12)


def _no_change(windows: Window) -> jax.Array:
    """`[batch, 40]`: sums of the absolute errors of forecasting no change."""
    return jnp.abs(windows.targets - windows.history[:, -1:]).sum(axis=-1)


def _relative_errors(changes: jax.Array, windows: Window) -> jax.Array:
    """See `Objective.errors`; `changes` are forecast changes of the last snapshot, `[batch, 40, n]`."""
    error = jnp.abs(changes - (windows.targets - windows.history[:, -1:])).sum(axis=-1)
    is_known = known_changes(windows)
    return jnp.where(is_known, error / jnp.where(is_known, _no_change(windows), 1.0), jnp.nan)


def _errors_at(horizon: int, changes: jax.Array, windows: Window) -> jax.Array:
    """See `Objective.errors`; `changes` are forecast changes of the last snapshot at a single horizon, `[batch, n]`."""
    errors = _relative_errors(changes[:, None], windows)
    return jnp.where(jnp.arange(NUM_HORIZONS)[None] == horizon - 1, errors, jnp.nan)


# Every kind of nowcaster that is trained on windows of single tensors, and the only place where one is registered.
OBJECTIVES: Mapping[str, Objective] = {
    "wnn": WNNObjective(),
    "wnn-plus": MultiHorizonObjective(WNNPlus, {"width": 128}),
    "adaptive-linear": MultiHorizonObjective(AdaptiveLinear, {"width": 64, "num_hidden": 2}),
    "pooled": MultiHorizonObjective(Pooled, {"width": 64, "num_hidden": 2}),
}
