"""What nowcasters with one network for all roles and many horizons have in common."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax._checks import check_int
from wnn_jax._roles import ROLES
from wnn_jax._trees import wide_dtype
from wnn_jax._window import LeafHistory, clip_horizon, summarize_nowcaster
from wnn_jax.nowcasters._leaves import LeafMap, check_chunk_size, finite_or_last, map_by_role
from wnn_jax.nowcasters._moments import Moments, moments_of_tensor

CONTEXT = 5
NUM_HORIZONS = 40

# On accelerators the default rounds the factors to fewer bits than the published outputs agree in.
_HIGHEST = jax.lax.Precision.HIGHEST
Dense = functools.partial(nn.Dense, precision=_HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MultiHorizonNowcaster:
    """A network that forecasts every weight from its own history and a few statistics.

    Subclasses name the class of their network, say what it is given (`statistics` and `changes`), and forecast leaves
    of one role with these (`forecast_leaves`). Both are used as they are by the training of the network.
    """

    params: Mapping[str, Any]
    default_horizon: int = 5
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], kw_only=True)

    # Not annotated, and so no fields.
    context = CONTEXT
    takes_horizon = True
    roles = ROLES

    network_class: ClassVar[type["HorizonNetwork"]]
    # Whether leaves are forecast at once only where they have one name.
    by_name: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            network = self.network
            expected = jax.tree.map(jnp.shape, _init_shapes(network))
        except (KeyError, TypeError, ValueError, IndexError):
            expected = None
        if expected is None or jax.tree.map(jnp.shape, dict(self.params)) != expected:
            raise ValueError(
                f"params are not the parameters of a {self.network_class.__name__}: they have the shapes "
                f"{jax.tree.map(jnp.shape, self.params)} where {expected or 'others'} are expected."
            )
        default_horizon = check_horizon("default_horizon", self.default_horizon, self.network.num_horizons)
        object.__setattr__(self, "default_horizon", default_horizon)

    def __repr__(self) -> str:
        return summarize_nowcaster(self, self.params)

    @property
    def network(self) -> "HorizonNetwork":
        """The network that `params` are of."""
        return self.network_class.of(self.params)

    @classmethod
    def init(cls, key: jax.Array, **sizes: Any) -> Self:
        """A randomly initialised network, to be trained.

        Args:
          key: a `jax.random` key.
          **sizes: the sizes of the network, where they are not to be the usual ones.
        """
        return cls(_init(cls.network_class(**sizes), key))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecasts a tree of parameters.

        Args:
          history: 5 parameter trees, oldest first.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: how many snapshots ahead, from 1 to 40, or `None` for `default_horizon`. A traced one is brought
            into that range.

        Returns:
          The forecast, a tree like the parameters.

        Raises:
          ValueError: if `horizon` is out of range or no int, or `history` does not have 5 trees.
        """
        known = known_horizon(horizon, self.default_horizon, self.network.num_horizons)

        def predict(role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            return self.forecast_leaves(leaves, jnp.array(ROLES.index(role)), known)

        return map_by_role(history, roles, predict, context=CONTEXT, handled=ROLES, by_name=self.by_name)

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """Forecasts leaves of one role.

        Args:
          leaves: of each leaf its 5 snapshots, oldest first.
          role: the index in `ROLES` of their role.
          horizon: a horizon, possibly traced.

        Returns:
          For each leaf an array of its shape and dtype.
        """
        raise NotImplementedError

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Any:
        """What the network is told of a whole tensor.

        Args:
          history: its snapshots, oldest first, NumPy or JAX arrays of one shape, not empty.

        Returns:
          A tree of arrays, as `changes` takes them for all weights of the tensor.
        """
        raise NotImplementedError

    @classmethod
    def statistics_of(cls, history: Sequence[Any], chosen: Any) -> Any:
        """What the network is told of some weights of a tensor, beside their own history.

        Args:
          history: the snapshots of the tensor, as for `statistics`.
          chosen: `[n]` ints, the weights, by their places in the flat tensor.

        Returns:
          A tree of arrays, as `changes` takes them for these weights.
        """
        del chosen
        return cls.statistics(history)

    def changes(
        self, history: tuple[jax.Array, ...], statistics: Any, role: jax.Array, horizon: Any = None
    ) -> jax.Array:
        """Forecasts how far weights of one tensor will have moved from their last snapshot.

        Args:
          history: 5 arrays `[n]`, oldest first, of float32 or wider.
          statistics: of the tensor, or of each of the weights: a tree of arrays that broadcast with these.
          role: the index in `ROLES` of its role.
          horizon: a horizon, or `None` for all of them.

        Returns:
          `[n]`, or `[n, num_horizons]` where `horizon` is `None`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChunkedNowcaster(MultiHorizonNowcaster):
    """One whose network is applied to every weight, a chunk of weights at a time.

    Beside a weight's own history it is given numbers of the whole tensor, which `summarize` makes from `Moments`.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """See `MultiHorizonNowcaster.forecast_leaves`."""
        leaf_map = LeafMap(_Prediction(type(self)), self.chunk_size, self.summarize)
        return leaf_map(leaves, jax.tree.map(jnp.asarray, dict(self.params)), role, horizon)

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Any:
        """See `MultiHorizonNowcaster.statistics`; a tree of scalars."""
        return cls.summarize(moments_of_tensor(history))

    @staticmethod
    def summarize(moments: Moments) -> Any:
        """What the network is told of tensors, from their moments."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Prediction:
    """The forecast of a chunk. Compares equal for nowcasters of one class."""

    nowcaster_class: type[ChunkedNowcaster]

    def __call__(
        self, history: LeafHistory, statistics: Any, params: Any, role: jax.Array, horizon: jax.Array
    ) -> jax.Array:
        wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
        change = self.nowcaster_class(params).changes(wide, statistics, role, horizon)
        return finite_or_last(wide[-1] + change, history)


class HorizonNetwork(nn.Module):
    """A network of a `MultiHorizonNowcaster`: hidden layers that know the role, and an output per horizon.

    Attributes:
      width: features of the hidden layers.
      num_hidden: how many hidden layers there are.
      num_horizons: how many snapshots ahead it forecasts.
    """

    width: int = 128
    num_hidden: int = 3
    num_horizons: int = NUM_HORIZONS

    # Not annotated, and so no fields.
    num_inputs = CONTEXT
    outputs_per_horizon = ()

    @nn.compact
    def __call__(self, inputs: Any, role: jax.Array, horizon: Any = None) -> Any:
        """Maps inputs `[*shape, num_inputs]` to `[*shape, num_horizons, *outputs_per_horizon]`.

        Args:
          inputs: what is known of each weight.
          role: the index in `ROLES` of the role of these weights.
          horizon: a horizon (an int, possibly traced), of which alone the outputs are computed, without an axis for
            horizons; or `None` for all of them.
        """
        embedded = nn.Embed(len(ROLES), self.width, name="role")(role)
        x = self.expand(inputs)
        x = x + _with_rank(embedded, x.ndim)
        for index in range(self.num_hidden):
            x = nn.silu(Dense(self.width, name=f"hidden_{index}")(x))
        return OneOfMany(self.num_horizons, self.outputs_per_horizon, name="output")(x, horizon)

    def expand(self, inputs: Any) -> jax.Array:
        """The first, linear layer, without the role: `[*shape, width]`. Used in `__call__` only."""
        return Dense(self.width, name="expand")(inputs)

    def example(self) -> Any:
        """Inputs of the shapes that it takes."""
        return jnp.zeros([1, self.num_inputs])

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """The network that has such parameters."""
        width, num_horizons = jnp.shape(params["output"]["kernel"])[:2]
        return cls(width, sum(name.startswith("hidden_") for name in params), num_horizons)


class OneOfMany(nn.Module):
    """Dense layers of which one can be computed without the others.

    Attributes:
      number: how many there are.
      shape: of the outputs of each.
    """

    number: int
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, features: jax.Array, chosen: Any = None) -> jax.Array:
        """Maps `[..., f]` to `[..., number, *shape]`, or to `[..., *shape]`, those of a chosen one, counted from 1."""
        shape = (self.number, *self.shape)
        kernel = self.param("kernel", _output_init, (features.shape[-1], *shape))
        bias = self.param("bias", nn.initializers.zeros, shape)
        if chosen is not None:
            # Parameters may be NumPy arrays, which a traced number cannot index.
            kernel, bias = jnp.asarray(kernel)[:, chosen - 1], jnp.asarray(bias)[chosen - 1]
        outputs = jnp.tensordot(features, kernel, axes=1, precision=_HIGHEST)
        return outputs + _with_rank(bias, outputs.ndim)


def _with_rank(array: jax.Array, rank: int) -> jax.Array:
    return jnp.expand_dims(jnp.asarray(array), tuple(range(rank - array.ndim)))


def _output_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Small, so that training starts near the last value.
    return 0.01 * jax.random.normal(key, shape)


class Scale(NamedTuple):
    """Mean and unbiased standard deviation of all values in the history of a tensor (scalars)."""

    mean: Any
    std: Any


def scale_of(moments: Moments) -> Scale:
    """The scale of tensors, from their moments.

    References:
      Knyazev et al., ICLR 2025.
    """
    return Scale(moments.mean, moments.unit * (moments.squares / (CONTEXT * moments.count - 1)) ** 0.5)


def normalize(values: Any, scale: Scale) -> Any:
    """Values in units of their tensors' standard deviations from the means, NumPy or JAX arrays."""
    # The constant is that of the published code.
    return (values - scale.mean) / (scale.std + 1e-6)


def known_horizon(horizon: Any, default: int, num_horizons: int) -> jax.Array:
    """The horizon that is meant: a traced one is brought into the range of those that are forecast.

    Raises:
      ValueError: if it is not traced, and out of that range or no int.
    """
    horizon = default if horizon is None else horizon
    if not isinstance(horizon, jax.Array):
        horizon = check_horizon("horizon", horizon, num_horizons)
    return clip_horizon(horizon, num_horizons)


def check_horizon(name: str, horizon: Any, num_horizons: int) -> int:
    """Raises a `ValueError` unless `horizon` is one that is forecast."""
    return check_int(name, horizon, "how many snapshots ahead to forecast", minimum=1, maximum=num_horizons)


def _init(network: HorizonNetwork, key: jax.Array) -> Any:
    return network.init(key, network.example(), jnp.array(0))["params"]


def _init_shapes(network: HorizonNetwork) -> Any:
    return jax.eval_shape(lambda key: _init(network, key), jax.random.key(0))
