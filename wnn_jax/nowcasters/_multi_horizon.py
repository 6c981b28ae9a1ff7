"""What networks that know all roles and many horizons have in common."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax._checks import check_int
from wnn_jax._roles import ROLES
from wnn_jax._window import LeafHistory, clip_horizon, summarize_nowcaster
from wnn_jax.nowcasters._leaves import CONTEXT, check_network, map_by_role

NUM_HORIZONS = 40

# The default precision of accelerators has fewer bits than the published outputs agree in.
HIGHEST = jax.lax.Precision.HIGHEST
Dense = functools.partial(nn.Dense, precision=HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MultiHorizonNowcaster:
    """A network that forecasts every weight from its own history and statistics of its tensor.

    A subclass has `network_class`, `statistics` and `changes`, which the training of the network uses as they are, and
    `forecast_leaves`.
    """

    params: Mapping[str, Any]
    default_horizon: int = 5
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], kw_only=True)

    # Not annotated, and so no fields.
    context = CONTEXT
    takes_horizon = True
    roles = ROLES

    network_class: ClassVar[type["HorizonNetwork"]]
    # Whether `forecast_leaves` is given leaves of one name only.
    by_name: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = self.network_class.__name__
        check_network("params", self.params, name, lambda: self.network.draw(jax.random.key(0)))
        default_horizon = check_horizon("default_horizon", self.default_horizon, self.network.num_horizons)
        object.__setattr__(self, "default_horizon", default_horizon)

    def __repr__(self) -> str:
        return summarize_nowcaster(self, self.params)

    @property
    def network(self) -> "HorizonNetwork":
        """The network that `params` belong to."""
        return self.network_class.of(self.params)

    @classmethod
    def init(cls, key: jax.Array, **sizes: Any) -> Self:
        """A randomly initialised network, to be trained; `sizes` are those that differ from the defaults."""
        return cls(cls.network_class(**sizes).draw(key))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecasts a tree of parameters.

        Args:
          history: 5 parameter trees, oldest first.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: how many snapshots ahead, from 1 to 40, or `None` for `default_horizon`. A traced horizon is clipped
            to that range.

        Returns:
          The forecast, a tree like the parameters.

        Raises:
          ValueError: if `horizon` is out of range or no int, or `history` does not have 5 trees.
        """
        known = known_horizon(horizon, self.default_horizon, self.network.num_horizons)

        def predict(role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            return self.forecast_leaves(leaves, jnp.array(ROLES.index(role)), known)

        return map_by_role(history, roles, predict, handled=ROLES, by_name=self.by_name)

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """Forecasts leaves, 5 snapshots each, of the role with this index in `ROLES`; the horizon may be traced."""
        raise NotImplementedError

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Any:
        """The statistics of a whole tensor, a tree of arrays as `changes` takes them for all its weights.

        Args:
          history: its snapshots, oldest first, arrays of one shape, not empty.
        """
        raise NotImplementedError

    @classmethod
    def statistics_of(cls, history: Sequence[Any], chosen: Any) -> Any:
        """The statistics for `chosen` weights of a tensor: `[n]` ints, their positions in the flat tensor."""
        del chosen
        return cls.statistics(history)

    def changes(
        self, history: tuple[jax.Array, ...], statistics: Any, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecasts how far weights of one tensor will have moved from their last snapshot.

        Args:
          history: 5 arrays `[n]`, oldest first, of float32 or wider.
          statistics: of the tensor or of each weight: a tree of arrays that broadcast with the history.
          role: the index of the tensor's role in `ROLES`.
          horizon: a horizon for `[n]` changes, or `None` for `[n, num_horizons]`.
        """
        raise NotImplementedError


class HorizonNetwork(nn.Module):
    """A network with hidden layers that know the role, and an output per horizon.

    Attributes:
      width: features of the hidden layers.
      num_hidden: how many hidden layers there are.
      num_horizons: how many snapshots ahead it forecasts.
    """

    width: int = 128
    num_hidden: int = 3
    num_horizons: int = NUM_HORIZONS

    # Not annotated, and so no field.
    outputs_per_horizon = ()

    @nn.compact
    def __call__(self, inputs: Any, role: jax.Array, horizon: Any = None) -> Any:
        """Maps inputs `[*shape, inputs]` to `[*shape, num_horizons, *outputs_per_horizon]`.

        With a `horizon`, an int that may be traced, it computes the outputs of this horizon only, without their axis.
        """
        embedded = nn.Embed(len(ROLES), self.width, name="role")(role)
        x = self.expand(inputs)
        x = x + _with_rank(embedded, x.ndim)
        for index in range(self.num_hidden):
            x = nn.silu(Dense(self.width, name=f"hidden_{index}")(x))
        return HorizonLayer(self.num_horizons, self.outputs_per_horizon, name="output")(x, horizon)

    def expand(self, inputs: Any) -> jax.Array:
        """The first, linear layer, without the role: `[*shape, width]`. Used in `__call__` only."""
        return Dense(self.width, name="expand")(inputs)

    def example(self) -> Any:
        """Inputs of the shapes that it takes."""
        return jnp.zeros([1, CONTEXT])

    def draw(self, key: jax.Array) -> Any:
        """Random parameters."""
        return self.init(key, self.example(), jnp.array(0))["params"]

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """The network that has such parameters."""
        width, num_horizons = jnp.shape(params["output"]["kernel"])[:2]
        return cls(width, sum(name.startswith("hidden_") for name in params), num_horizons)


class HorizonLayer(nn.Module):
    """One dense layer per horizon, with outputs of this shape, and a way to compute one layer without the others."""

    num_horizons: int
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, features: jax.Array, horizon: Any = None) -> jax.Array:
        """Maps `[..., f]` to `[..., num_horizons, *shape]`, or to `[..., *shape]` where a horizon is given."""
        shape = (self.num_horizons, *self.shape)
        # Small, so that training starts near the last value.
        kernel = self.param("kernel", nn.initializers.normal(0.01), (features.shape[-1], *shape))
        bias = self.param("bias", nn.initializers.zeros, shape)
        if horizon is not None:
            # Parameters may be NumPy arrays, which a traced number cannot index.
            kernel, bias = jnp.asarray(kernel)[:, horizon - 1], jnp.asarray(bias)[horizon - 1]
        outputs = jnp.tensordot(features, kernel, axes=1, precision=HIGHEST)
        return outputs + _with_rank(bias, outputs.ndim)


def _with_rank(array: jax.Array, rank: int) -> jax.Array:
    return jnp.expand_dims(jnp.asarray(array), tuple(range(rank - array.ndim)))


def known_horizon(horizon: Any, default: int, num_horizons: int) -> jax.Array:
    """The horizon to forecast, as an array; a traced horizon is clipped to the range of the network.

    Raises:
      ValueError: if it is not traced, and out of that range or no int.
    """
    horizon = default if horizon is None else horizon
    if not isinstance(horizon, jax.Array):
        horizon = check_horizon("horizon", horizon, num_horizons)
    return clip_horizon(horizon, num_horizons)


def check_horizon(name: str, horizon: Any, num_horizons: int) -> int:
    """Raises a `ValueError` unless the network forecasts this horizon."""
    return check_int(name, horizon, "how many snapshots ahead to forecast", minimum=1, maximum=num_horizons)
