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
from wnn_jax._window import LeafHistory, summarize_nowcaster
from wnn_jax.nowcasters._leaves import LeafMap, check_chunk_size, finite_or_last, map_by_role

CONTEXT = 5

# On accelerators the default rounds the factors to fewer bits than the published outputs agree in.
_HIGHEST = jax.lax.Precision.HIGHEST
_Dense = functools.partial(nn.Dense, precision=_HIGHEST)
_matmul = functools.partial(jnp.matmul, precision=_HIGHEST)
_published_init = nn.initializers.variance_scaling(0.1, "fan_in", "uniform")


class Stream(nn.Module):
    """One stream of the network: a bottleneck, the "activation network", and a projection."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[..., n]` inputs to `[..., 32]` features."""
        expanded = _Dense(64, kernel_init=_published_init, name="expand")(inputs)
        bottleneck = nn.relu(_Dense(8, kernel_init=nn.initializers.glorot_uniform(), name="squeeze")(expanded))
        offset = _Dense(64, kernel_init=_published_init, name="offset")(bottleneck)
        gain = _Dense(64, kernel_init=_published_init, name="gain")(bottleneck)
        exponent = _Dense(64, kernel_init=_published_init, name="exponent")(bottleneck)
        activated = offset + gain * jnp.exp(exponent * expanded)
        return nn.leaky_relu(_Dense(32, kernel_init=_published_init, name="project")(activated), 0.3)


class TwoStreamNetwork(nn.Module):
    """Forecasts normalised weights from their values and from the differences between these.

    References:
      Jang et al., ICML 2023.
    """

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        """Maps `[..., 5]` normalised values, oldest first, to `[...]` changes of the last one, in (-1, 1)."""
        differences = values[..., 1:] - values[..., :-1]
        features = jnp.concatenate([Stream(name="values")(values), Stream(name="differences")(differences)], axis=-1)
        change = _Dense(1, kernel_init=nn.initializers.glorot_uniform(), name="output")(features)
        return jnp.tanh(change)[..., 0]


class Normalized(NamedTuple):
    """Histories brought to one range, weight by weight.

    Attributes:
      values: `[context, n]`, within [-0.5, 0.5].
      first: `[n]`, the oldest snapshots.
      span: `[n]`, what the values were divided by. `values * span + first` is the history again.
    """

    values: jax.Array
    first: jax.Array
    span: jax.Array


def normalize(history: Sequence[jax.Array]) -> Normalized:
    """Normalises the history of each weight by its first value and its range.

    Args:
      history: `context` arrays of shape `[n]`, oldest first.

    References:
      Jang et al., ICML 2023, with the constants of the published code.
    """
    first = history[0]
    shifted = jnp.stack([snapshot - first for snapshot in history])
    value_range = jnp.max(shifted, axis=0) - jnp.min(shifted, axis=0) + 1e-8
    span = 2 * (value_range + 1e-5)
    return Normalized(shifted / span[None], first, span)


class MergedStream(NamedTuple):
    """The layers of a `Stream`, those that follow one another without anything in between multiplied together.

    Each is a kernel `[outputs, inputs]` and a bias `[outputs, 1]`.

    Attributes:
      expand: from the inputs, 64 outputs.
      squeeze: from the inputs, 8: `squeeze` after `expand`.
      modulate: from these, 128: `gain` and `exponent`.
      project: from the activated, 32; its bias has those of the layers before it in it.
      skip: from the squeezed, 32, without a bias: `project` after `offset`.
    """

    expand: tuple[jax.Array, jax.Array]
    squeeze: tuple[jax.Array, jax.Array]
    modulate: tuple[jax.Array, jax.Array]
    project: tuple[jax.Array, jax.Array]
    skip: jax.Array

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[inputs, n]` to `[32, n]` features."""
        bottleneck = nn.relu(_dense(self.squeeze, inputs))
        gain, exponent = jnp.split(_dense(self.modulate, bottleneck), 2)
        activated = gain * jnp.exp(exponent * _dense(self.expand, inputs))
        features = _dense(self.project, activated) + _matmul(self.skip, bottleneck)
        return nn.leaky_relu(features, 0.3)


class MergedNetwork(NamedTuple):
    """A `TwoStreamNetwork` as it is used: the same function, in four fifths of the operations, weights last."""

    values: MergedStream
    differences: MergedStream
    output: tuple[jax.Array, jax.Array]

    def __call__(self, values: jax.Array) -> jax.Array:
        """Maps `[5, n]` normalised values, oldest first, to `[n]` changes of the last one, in (-1, 1)."""
        features = jnp.concatenate([self.values(values), self.differences(values[1:] - values[:-1])])
        return jnp.tanh(_dense(self.output, features))[0]


def merge_layers(params: Any) -> MergedNetwork:
    """What the parameters of a `TwoStreamNetwork` make of it."""

    def layer(stream: Any, name: str) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(stream[name]["kernel"]).T, jnp.asarray(stream[name]["bias"])[:, None]

    def then(first: Any, second: Any) -> tuple[jax.Array, jax.Array]:
        return _matmul(second[0], first[0]), _matmul(second[0], first[1]) + second[1]

    def merge(stream: Any) -> MergedStream:
        expand, squeeze, offset, gain, exponent, project = (
            layer(stream, name) for name in ("expand", "squeeze", "offset", "gain", "exponent", "project")
        )
        skip, bias = then(offset, project)
        modulate = jnp.concatenate([gain[0], exponent[0]]), jnp.concatenate([gain[1], exponent[1]])
        return MergedStream(expand, then(expand, squeeze), modulate, (project[0], bias), skip)

    return MergedNetwork(merge(params["values"]), merge(params["differences"]), layer(params, "output"))


def _dense(layer: tuple[jax.Array, jax.Array], inputs: jax.Array) -> jax.Array:
    kernel, bias = layer
    return _matmul(kernel, inputs) + bias


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WNN:
    """The weight nowcaster network (WNN).

    Every scalar weight is forecast from its own last 5 snapshots, about 5 snapshots ahead, by the network of its
    role. Leaves of a role without a network come back unchanged; with the roles of the published networks
    (`conv`, `dense`, `bias`) these are the scales of norm layers and the embeddings, for which nothing was trained.
    (The published code passes over the shift of BatchNorm too. Here it is a `bias`; name it `norm` in `roles` to
    pass over it.)

    Attributes:
      params: role -> parameters of that role's `TwoStreamNetwork`.
      published_bias: for role `bias`, add the network's output to the *raw* last value, as the published code does
        where its paper adds it to the normalised one. For comparisons only: it throws the biases far off.
      chunk_size: how many weights go through a network at a time, which bounds the working memory: about 1 KiB
        for each of them. `None`: 8192 on CPU, 131,072 elsewhere.
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

    # Not annotated, and so no fields: they are the same for all WNNs.
    context = CONTEXT
    takes_horizon = False
    default_horizon = 5

    def __post_init__(self) -> None:
        if not self.params or not set(self.params) <= set(ROLES):
            raise ValueError(f"params has the roles {sorted(self.params)}; give at least one of {', '.join(ROLES)}.")
        check_bool("published_bias", self.published_bias, "whether biases are forecast as by the published code")
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))
        expected = jax.tree.map(jnp.shape, jax.eval_shape(_init_network, jax.random.key(0)))
        for role, network in self.params.items():
            if jax.tree.map(jnp.shape, network) != expected:
                raise ValueError(
                    f"params[{role!r}] are not the parameters of a TwoStreamNetwork: they have the shapes "
                    f"{jax.tree.map(jnp.shape, network)} where {expected} are expected."
                )

    def __repr__(self) -> str:
        return summarize_nowcaster(self, self.params)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it has networks for; leaves of others come back unchanged."""
        return tuple(sorted(self.params))

    @classmethod
    def init(cls, key: jax.Array, roles: Sequence[str] = ("conv", "dense", "bias")) -> "WNN":
        """Networks with the paper's random initialisation, to be trained.

        Args:
          key: a `jax.random` key.
          roles: the roles to make a network for.
        """
        keys = jax.random.split(key, len(roles))
        return cls({role: _init_network(role_key) for role, role_key in zip(roles, keys, strict=True)})

    def __call__(self, history: Sequence[Any], roles: Any, horizon: None = None) -> Any:
        """Forecasts a tree of parameters.

        Args:
          history: 5 parameter trees, oldest first.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: must be `None`: the horizon of these networks is fixed by their training.

        Returns:
          The forecast, a tree like the parameters.

        Raises:
          ValueError: if `horizon` is not `None`, or `history` does not have 5 trees.
        """
        if horizon is not None:
            raise ValueError(f"horizon={horizon!r} was given, but WNN takes none: it is fixed by the training.")
        return map_by_role(history, roles, self._predict_leaves, context=CONTEXT, handled=self.params)

    def _predict_leaves(self, role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
        fn = _predict_published_bias if role == "bias" and self.published_bias else _predict
        return LeafMap(fn, self.chunk_size)(leaves, merge_layers(self.params[role]))


def _predict(history: LeafHistory, statistics: None, network: MergedNetwork) -> jax.Array:
    return _forecast(history, network, published_bias=False)


def _predict_published_bias(history: LeafHistory, statistics: None, network: MergedNetwork) -> jax.Array:
    return _forecast(history, network, published_bias=True)


def _forecast(history: LeafHistory, network: MergedNetwork, *, published_bias: bool) -> jax.Array:
    # Low-precision leaves are forecast in fp32. The networks are fp32 whatever the leaf is.
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    values, first, span = normalize(wide)
    change = network(values.astype(jnp.float32))
    last = wide[-1] if published_bias else values[-1]
    return finite_or_last((last + change) * span + first, history)


def _init_network(key: jax.Array) -> Any:
    return TwoStreamNetwork().init(key, jnp.zeros([1, CONTEXT]))["params"]
