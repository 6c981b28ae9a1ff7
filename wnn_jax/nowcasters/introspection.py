"""The introspection network: one small network for all weights, of four snapshots that are not evenly spaced."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wnn_jax._history import wide_dtype
from wnn_jax._nowcaster import LeafHistory, summarize_nowcaster
from wnn_jax._roles import ROLES
from wnn_jax.nowcasters._leaves import LeafMap, check_chunk_size, finite_or_last, map_by_role

# A window is 10 visits long: its snapshots are at 0, 0.4, 0.7 and 1 of it.
OFFSETS = (0, 4, 7, 10)

# On accelerators the default rounds the factors.
_Dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)


class IntrospectionNetwork(nn.Module):
    """Forecasts normalised weights: 4 inputs, 40 rectified linear units, 1 output.

    References:
      Sinha et al., ICLR 2017.
    """

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        """Maps `[..., 4]` normalised values, oldest first, to `[...]` changes of the last one."""
        hidden = nn.relu(_Dense(40, name="hidden")(values))
        return _Dense(1, name="output")(hidden)[..., 0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Introspection:
    """The introspection network.

    One network forecasts every scalar weight, of whatever role, from its values at the beginning of a window, at 0.4
    and 0.7 of it and at its end, as far ahead as the window is long: from 0, 0.4 t, 0.7 t and t at 2 t. A window is of
    11 visits, of which 4 leave a snapshot, so that `nowcast` jumps at every eleventh by 10 times `snapshot_every`.

    Three things are not the paper's. There, values are multiplied by 1000 and otherwise given as they are, to a network
    that learned from one MNIST classifier; here those of each weight are normalised by its first value and its range,
    and the network forecasts the change of the last one: so a forecast is of the size of the moves so far, which
    differs from layer to layer and from model to model. There, a window begins with the training, and a few steps to
    jump at are picked by hand; here windows follow one another, because none may span a jump. And the network was
    trained by us, on networks of several kinds.

    Attributes:
      params: the parameters of its `IntrospectionNetwork`.
      chunk_size: how many weights go through the network at a time, which bounds the working memory: about 0.2 KiB for
        each of them. `None`: 8192 on CPU, 131,072 elsewhere.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network.

    References:
      Sinha et al., `Introspection: Accelerating Neural Network Training By Learning Weight Evolution
      <https://arxiv.org/abs/1704.04959>`_, ICLR 2017
    """

    params: Mapping[str, Any]
    chunk_size: int | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    # Not annotated, and so no fields: they are the same for all introspection networks.
    context = len(OFFSETS)
    offsets = OFFSETS
    takes_horizon = False
    default_horizon = OFFSETS[-1]
    roles = ROLES

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_size", check_chunk_size(self.chunk_size))
        actual = jax.tree.map(jnp.shape, self.params)
        expected = jax.tree.map(jnp.shape, jax.eval_shape(_init_network, jax.random.key(0)))
        if actual != expected:
            raise ValueError(
                f"params are not the parameters of an IntrospectionNetwork: they have the shapes {actual} where "
                f"{expected} are expected."
            )

    def __repr__(self) -> str:
        return summarize_nowcaster(self, self.params)

    @classmethod
    def init(cls, key: jax.Array) -> "Introspection":
        """A randomly initialised network, to be trained.

        Args:
          key: a `jax.random` key.
        """
        return cls(_init_network(key))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: None = None) -> Any:
        """Forecasts a tree of parameters.

        Args:
          history: 4 parameter trees, oldest first, of the visits 0, 4, 7 and 10 of a window.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: must be `None`: it is 10 snapshots, as long as the window.

        Returns:
          The forecast, a tree like the parameters.

        Raises:
          ValueError: if `horizon` is not `None`, or `history` does not have 4 trees.
        """
        if horizon is not None:
            raise ValueError(
                f"horizon={horizon!r} was given, but Introspection takes none: it is fixed by the training."
            )
        return map_by_role(history, roles, self._predict_leaves, context=self.context, handled=ROLES)

    def _predict_leaves(self, role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
        del role
        return LeafMap(_forecast, self.chunk_size)(leaves, jax.tree.map(jnp.asarray, self.params))

    def changes(self, history: LeafHistory) -> jax.Array:
        """Forecasts how far weights will have moved from their last snapshot.

        Args:
          history: 4 arrays of one shape, oldest first, of float32 or wider.

        Returns:
          An array of that shape.
        """
        moves = jnp.stack([snapshot - history[0] for snapshot in history], axis=-1)
        # As WNN normalises, but without the constants that keep it from zero: by these, weights that hardly move would
        # jump.
        span = 2 * jnp.ptp(moves, axis=-1)
        values = moves / jnp.where(span > 0, span, 1)[..., None]
        change = IntrospectionNetwork().apply({"params": self.params}, values.astype(jnp.float32))
        assert isinstance(change, jax.Array)
        return change * span


def _forecast(history: LeafHistory, statistics: None, params: Any) -> jax.Array:
    del statistics
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    return finite_or_last(wide[-1] + Introspection(params).changes(wide), history)


def _init_network(key: jax.Array) -> Any:
    return IntrospectionNetwork().init(key, jnp.zeros([1, len(OFFSETS)]))["params"]
