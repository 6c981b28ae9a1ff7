"""What each kind of nowcaster is trained to do."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from wnn_jax._nowcaster import Nowcaster
from wnn_jax.meta.windows import CONTEXT, NUM_HORIZONS, Window
from wnn_jax.nowcasters import WNN, AdaptiveLinear, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster
from wnn_jax.nowcasters.wnn import TwoStreamNetwork, normalize

# "About 5 snapshots ahead", as the published WNN.
WNN_HORIZON = 5


class Objective(Protocol):
    """A kind of nowcaster, and the loss that it is trained with."""

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from."""
        ...

    def statistics(self, history: Any) -> Any:
        """What the nowcaster is told of a whole tensor."""
        ...

    def loss(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """The training loss of a batch, in which `roles` take turns."""
        ...

    def errors(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """Forecast errors as a share of those of forecasting no change.

        Returns:
          `[batch, 40]`: sums of absolute errors over the weights of each window, divided; NaN at horizons that are not
          forecast, or that the run has not, or where nothing moved.
        """
        ...

    def optimizer(self, num_steps: int, learning_rate: float) -> optax.GradientTransformation:
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

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from."""
        del roles
        return self.nowcaster_class.init(key, **self.sizes).params

    def statistics(self, history: Any) -> Any:
        """What the nowcaster is told of a whole tensor."""
        return self.nowcaster_class.statistics(history)

    def loss(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """Absolute errors summed over the weights of a window, over those of no change; then the mean."""
        return jnp.nanmean(self.errors(params, batch, roles))

    def errors(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """See `Objective.errors`."""
        del roles  # The network is told.
        nowcaster = self.nowcaster_class(params)

        def changes(window: Window) -> jax.Array:
            return nowcaster.changes(tuple(window.history), window.statistics, window.role).T

        return _relative_errors(jax.vmap(changes)(batch), batch)

    def optimizer(self, num_steps: int, learning_rate: float) -> optax.GradientTransformation:
        """As Knyazev et al. train theirs."""
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=min(1e-6 / learning_rate, 1.0))
        return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=1e-2))

    def nowcaster(self, params: Any, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        return self.nowcaster_class(params, record=record)


@dataclasses.dataclass(frozen=True)
class WNNObjective:
    """The paper's: L1 in normalised units, 5 snapshots ahead, and L1 regularisation.

    References:
      Jang et al., ICML 2023, with the constants of the published code.
    """

    def init(self, key: jax.Array, roles: tuple[str, ...]) -> Any:
        """Parameters to start from: one network per role."""
        return WNN.init(key, roles).params

    def statistics(self, history: Any) -> Any:
        """Nothing: every weight is normalised by its own history."""
        del history
        return ()

    def loss(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """Mean absolute error of the normalised forecast, plus the regularisation."""
        losses: list[jax.Array] = []
        for role, of_role in _by_role(batch, roles):
            history = tuple(jnp.moveaxis(of_role.history, 1, 0).reshape(CONTEXT, -1))
            values, first, span = normalize(history)
            change = TwoStreamNetwork().apply({"params": params[role]}, values.T)
            assert isinstance(change, jax.Array)
            target = (of_role.targets[:, WNN_HORIZON - 1].reshape(-1) - first) / span
            # A weight that did not move has no range to be normalised by.
            moved = jnp.ptp(values, axis=0) > 0.1
            error = jnp.abs(values[-1] + change - target)
            losses.append(jnp.sum(error * moved) / jnp.maximum(jnp.sum(moved), 1) + _regularization(params[role]))
        return jnp.stack(losses).mean()

    def errors(self, params: Any, batch: Window, roles: tuple[str, ...]) -> jax.Array:
        """See `Objective.errors`."""
        nowcaster = WNN(params)
        parts: list[jax.Array] = []
        for role, of_role in _by_role(batch, roles):
            history = tuple(jnp.moveaxis(of_role.history, 1, 0))
            change = nowcaster([{role: x} for x in history], {role: role})[role] - history[-1]
            part = _relative_errors(change[:, None], of_role)
            parts.append(jnp.where(jnp.arange(NUM_HORIZONS)[None] == WNN_HORIZON - 1, part, jnp.nan))
        return jnp.stack(parts, axis=1).reshape(-1, NUM_HORIZONS)

    def optimizer(self, num_steps: int, learning_rate: float) -> optax.GradientTransformation:
        """Adam, decayed."""
        return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def nowcaster(self, params: Any, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        return WNN(params, record=record)


def _by_role(batch: Window, roles: tuple[str, ...]) -> Iterator[tuple[str, Window]]:
    """Each role with its windows."""
    for offset, role in enumerate(roles):
        yield role, jax.tree.map(lambda leaf: leaf[offset :: len(roles)], batch)  # noqa: B023


def _regularization(network: Any) -> jax.Array:
    wide = [
        layer for stream in ("values", "differences") for name, layer in network[stream].items() if name != "squeeze"
    ]
    kernels = sum(jnp.abs(layer["kernel"]).sum() for layer in wide)
    biases = sum(jnp.abs(layer["bias"]).sum() for layer in wide)
    return jnp.asarray(1e-6 * kernels + 0.1 * biases)


def _relative_errors(changes: jax.Array, batch: Window) -> jax.Array:
    """See `Objective.errors`; `changes` are forecast ones after the last snapshot, `[batch, 40, n]`."""
    actual = batch.targets - batch.history[:, -1:]
    error = jnp.abs(changes - actual).sum(axis=-1)
    no_change = jnp.abs(actual).sum(axis=-1)
    is_known = batch.is_known & (no_change > 1e-12)
    return jnp.where(is_known, error / jnp.where(is_known, no_change, 1.0), jnp.nan)


OBJECTIVES: Mapping[str, Objective] = {
    "wnn": WNNObjective(),
    "wnn-plus": MultiHorizonObjective(WNNPlus, {"width": 128}),
    "adaptive-linear": MultiHorizonObjective(AdaptiveLinear, {"width": 64, "num_hidden": 2}),
}
