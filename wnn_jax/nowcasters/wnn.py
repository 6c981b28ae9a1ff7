"""The weight nowcaster network: one small two-stream network per kind of operation, applied to every weight."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax._checks import check_bool
from wnn_jax._roles import ROLES
from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory, short_repr
from wnn_jax.nowcasters._leaves import (
    CONTEXT,
    LeafMap,
    check_chunk_size,
    check_network,
    finite_or_last,
    map_by_role,
)
from wnn_jax.nowcasters._multi_horizon import Dense

_published_init = nn.initializers.variance_scaling(0.1, "fan_in", "uniform")


class Stream(nn.Module):
    """One stream of the network: a bottleneck, the "activation network", and a projection."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map `[..., n]` inputs to `[..., 32]` features."""
        expanded = Dense(64, kernel_init=_published_init, name="expand")(inputs)
        bottleneck = nn.relu(Dense(8, kernel_init=nn.initializers.glorot_uniform(), name="squeeze")(expanded))
        offset, gain, exponent = (
            Dense(64, kernel_init=_published_init, name=name)(bottleneck) for name in ("offset", "gain", "exponent")
        )
        activated = offset + gain * jnp.exp(exponent * expanded)
        return nn.leaky_relu(Dense(32, kernel_init=_published_init, name="project")(activated), 0.3)


class TwoStreamNetwork(nn.Module):
    """Forecast normalised weights from their values and from the differences between these (Jang et al., ICML 2023)."""

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        """Map `[..., 5]` normalised values, oldest first, to `[...]` changes of the last one, in (-1, 1)."""
        differences = values[..., 1:] - values[..., :-1]
        features = jnp.concatenate([Stream(name="values")(values), Stream(name="differences")(differences)], axis=-1)
        change = Dense(1, kernel_init=nn.initializers.glorot_uniform(), name="output")(features)
        return jnp.tanh(change)[..., 0]


class Normalized(NamedTuple):
    """Histories brought to one range, weight by weight: `values * span + first` is the history again."""

    values: jax.Array
    """`[context, n]`, within [-0.5, 0.5]."""
    first: jax.Array
    """`[n]`, the oldest snapshots."""
    span: jax.Array
    """`[n]`, about twice the range of each weight."""


def normalize(history: Sequence[jax.Array]) -> Normalized:
    """Normalise the history of each weight, `context` arrays `[n]`, by its first value and its range."""
    first = history[0]
    shifted = jnp.stack([snapshot - first for snapshot in history])
    # The constants are those of the published code.
    value_range = jnp.max(shifted, axis=0) - jnp.min(shifted, axis=0) + 1e-8
    span = 2 * (value_range + 1e-5)
    return Normalized(shifted / span[None], first, span)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WNN:
    """The weight nowcaster network (WNN).

    The network of its role forecasts every scalar weight from the weight's own last 5 snapshots, about 5 snapshots
    ahead. Leaves of a role without a network keep their values. The published networks are for `conv`, `dense` and
    `bias`. The published code also leaves out the shift of BatchNorm. Here the shift is a `bias`: name it `norm` in
    `roles` to leave it out.

    Attributes:
      params: role -> parameters of that role's `TwoStreamNetwork`.
      published_bias: for role `bias`, add the network's output to the *raw* last value, as the published code does. The
        paper adds it to the normalised value. For comparisons only: it throws the biases far off.
      chunk_size: how many weights go through a network at a time, about 1 KiB of working memory each. `None`: 8192 on
        CPU, 131,072 elsewhere.
      record: how the networks were trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` has an unknown role, or parameters of another network.

    References:
      Jang et al., `Learning to Boost Training by Periodic Nowcasting Near Future Weights
      <https://proceedings.mlr.press/v202/jang23b.html>`_, ICML 2023
    """

    params: Mapping[str, Any]
    published_bias: bool = False
    chunk_size: int | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    # Not annotated, and so no fields.
    context = CONTEXT
    takes_horizon = False
    default_horizon = 5

    def __post_init__(self) -> None:
        if not self.params or not set(self.params) <= set(ROLES):
            raise ValueError(f"params has the roles {sorted(self.params)}; give at least one of {', '.join(ROLES)}.")
        check_bool("published_bias", self.published_bias, "whether biases are forecast as by the published code")
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))
        for role, network in self.params.items():
            check_network(f"params[{role!r}]", network, "TwoStreamNetwork", _init_network)

    def __repr__(self) -> str:
        return short_repr(self, self.params)

    @property
    def roles(self) -> tuple[str, ...]:
        """Return the roles that it has networks for."""
        return tuple(sorted(self.params))

    @classmethod
    def init(cls, key: jax.Array, roles: Sequence[str] = ("conv", "dense", "bias")) -> "WNN":
        """Make networks for these roles with the paper's random initialisation, to be trained."""
        keys = jax.random.split(key, len(roles))
        return cls({role: _init_network(role_key) for role, role_key in zip(roles, keys, strict=True)})

    def __call__(self, history: Sequence[Any], roles: Any, horizon: None = None) -> Any:
        """Forecast a tree of parameters; see `Nowcaster`. The training of these networks fixes their horizon."""
        if horizon is not None:
            raise ValueError(f"horizon={horizon!r} was given, but WNN takes none: it is fixed by the training.")
        return map_by_role(history, roles, self._predict_leaves, handled=self.params)

    def _predict_leaves(self, role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
        fn = _forecast_published_bias if role == "bias" and self.published_bias else _forecast
        return LeafMap(fn, self.chunk_size)(leaves, jax.tree.map(jnp.asarray, self.params[role]))


def _forecast(history: LeafHistory, params: Any, *, published_bias: bool = False) -> jax.Array:
    # Low-precision leaves are forecast in float32. The networks are always in float32.
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    values, first, span = normalize(wide)
    change = TwoStreamNetwork().apply({"params": params}, values.T.astype(jnp.float32))
    assert isinstance(change, jax.Array)
    last = wide[-1] if published_bias else values[-1]
    return finite_or_last((last + change) * span + first, history)


# A single object, so that equal maps share what is compiled.
_forecast_published_bias = functools.partial(_forecast, published_bias=True)


def _init_network(key: jax.Array) -> Any:
    return TwoStreamNetwork().init(key, jnp.zeros([1, CONTEXT]))["params"]
