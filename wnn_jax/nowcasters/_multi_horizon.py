"""The common part of networks that know all roles and many horizons."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._roles import ROLES
from wnn_jax._window import LeafHistory, short_repr
from wnn_jax.nowcasters._leaves import CONTEXT, check_horizon, check_network, known_horizon, map_by_role

NUM_HORIZONS = 40

# The default precision of accelerators has too few bits to agree with the published outputs.
HIGHEST = jax.lax.Precision.HIGHEST
Dense = functools.partial(nn.Dense, precision=HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MultiHorizonNowcaster:
    """A network that forecasts every weight from its own history and statistics of its tensor.

    A subclass has `network_class`, `forecast_leaves`, and `statistics` and `changes`, which training uses, too.
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
        check_network("params", self.params, name, lambda key: self.network.draw(key))
        default_horizon = check_horizon("default_horizon", self.default_horizon, self.network.num_horizons)
        object.__setattr__(self, "default_horizon", default_horizon)

    def __repr__(self) -> str:
        return short_repr(self, self.params)

    @property
    def network(self) -> "HorizonNetwork":
        """Return the network that `params` belong to."""
        return self.network_class.of(self.params)

    @classmethod
    def init(cls, key: jax.Array, **sizes: Any) -> Self:
        """Make a random network, to be trained; `sizes` are the ones that differ from the defaults."""
        return cls(cls.network_class(**sizes).draw(key))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecast a tree of parameters; see `Nowcaster`. A horizon that is an array is clipped to the known range."""
        known = known_horizon(horizon, self.default_horizon, self.network.num_horizons)

        def predict(role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            return self.forecast_leaves(leaves, jnp.array(ROLES.index(role)), known)

        return map_by_role(history, roles, predict, handled=ROLES, by_name=self.by_name)

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """Forecast leaves, 5 snapshots each, of the role with this index in `ROLES`; the horizon may be traced."""
        raise NotImplementedError

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Any:
        """Return the statistics of a tensor that is not empty, a tree of arrays as `changes` takes them."""
        raise NotImplementedError

    @classmethod
    def statistics_of(cls, history: Sequence[Any], chosen: Any) -> Any:
        """Return the statistics for `chosen` weights of a tensor: `[n]` ints, their positions in the flat tensor."""
        del chosen
        return cls.statistics(history)

    def changes(
        self, history: tuple[jax.Array, ...], statistics: Any, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecast how far weights of one tensor will have moved, `[n]`, or `[n, num_horizons]` without a horizon.

        The history is 5 arrays `[n]` of float32 or wider. The statistics broadcast with it.
        """
        raise NotImplementedError


class HorizonNetwork(nn.Module):
    """A network with hidden layers of a width that know the role, and an output per horizon."""

    width: int = 128
    num_hidden: int = 3
    num_horizons: int = NUM_HORIZONS

    # Not annotated, and so no fields.
    outputs_per_horizon = ()
    example = np.zeros([1, CONTEXT], np.float32)

    @nn.compact
    def __call__(self, inputs: Any, role: jax.Array, horizon: Any = None) -> Any:
        """Map inputs `[*shape, inputs]` to `[*shape, num_horizons, *outputs_per_horizon]`.

        With a `horizon`, an int that may be traced, it computes the outputs of this horizon only, without their axis.
        """
        x = self.expand(inputs)
        x = x + _with_rank(nn.Embed(len(ROLES), self.width, name="role")(role), x.ndim)
        for index in range(self.num_hidden):
            x = nn.silu(Dense(self.width, name=f"hidden_{index}")(x))
        return HorizonLayer(self.num_horizons, self.outputs_per_horizon, name="output")(x, horizon)

    def expand(self, inputs: Any) -> jax.Array:
        """Apply the first, linear layer, without the role: `[*shape, width]`. Used in `__call__` only."""
        return Dense(self.width, name="expand")(inputs)

    def draw(self, key: jax.Array) -> Any:
        """Make random parameters."""
        return self.init(key, self.example, jnp.array(0))["params"]

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """Return the network that has such parameters."""
        width, num_horizons = jnp.shape(params["output"]["kernel"])[:2]
        return cls(width, sum(name.startswith("hidden_") for name in params), num_horizons)


class HorizonLayer(nn.Module):
    """One dense layer per horizon, with outputs of this shape, and a way to compute one layer without the others."""

    num_horizons: int
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, features: jax.Array, horizon: Any = None) -> jax.Array:
        """Map `[..., f]` to `[..., num_horizons, *shape]`, or to `[..., *shape]` with a horizon."""
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
