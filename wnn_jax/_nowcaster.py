"""What a nowcaster is: the protocol, and an adapter for functions of one leaf."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_int, is_int
from wnn_jax._roles import ROLES

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# How far ahead a nowcaster forecasts that does not say it, in snapshots.
DEFAULT_HORIZON = 5

LeafHistory = tuple[jax.Array, ...]
LeafFn = Callable[[LeafHistory, str, Any], jax.Array]


@runtime_checkable
class Nowcaster(Protocol):
    """Forecasts parameters from their own recent history.

    Any object with these two members is a nowcaster; nothing needs to inherit.
    `nowcast` also reads four attributes if they are there:

    - `takes_horizon` (default `True`): whether `horizon` means anything to it.
      Where it is `False`, `nowcast(horizon=...)` is refused.
    - `default_horizon` (default 5): how many snapshots ahead it forecasts where
      `horizon` is `None`. By it and by their range in the window the moves of
      weights are bounded; see `nowcast`.
    - `offsets` (default `range(context)`): which visits of a window leave its
      snapshots, as `context` increasing ints from 0 on. With `(0, 4, 7, 10)` the
      snapshots are 4, 3 and 3 times `snapshot_every` apart, and only they are kept.
    - `check_params(params, roles)`: raises a `ValueError` if it cannot forecast such parameters. It is called when the
      state is initialised, and may prepare what it needs of their shapes.

    Attributes:
      context: how many snapshots a prediction is made from.
    """

    @property
    def context(self) -> int: ...

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any) -> Any:
        """Predicts the parameters.

        Args:
          history: `context` trees like the parameters, oldest first, evenly spaced or at its `offsets`.
          roles: a tree like the parameters with a role name (see `default_roles`) at each leaf.
          horizon: how many snapshots after the last one to predict (an int, possibly traced), or
            `None` for the nowcaster's own default.

        Returns:
          The predicted parameters: the same tree, shapes and dtypes. A leaf whose role the nowcaster
          does not handle comes back as it is in the last snapshot.
        """
        ...


def offsets_of(nowcaster: Nowcaster) -> tuple[int, ...]:
    """The visits of a window at which a nowcaster wants its snapshots, counted from 0. At the last one it jumps.

    Raises:
      ValueError: if they are not `context` increasing ints from 0 on.
    """
    context = nowcaster.context
    offsets = tuple(getattr(nowcaster, "offsets", range(context)))
    is_increasing = all(map(is_int, offsets)) and all(one < other for one, other in itertools.pairwise(offsets))
    if not is_increasing or offsets[:1] != (0,) or len(offsets) != context:
        raise ValueError(
            f"offsets={offsets!r} of the nowcaster {type(nowcaster).__name__.lstrip('_')} must be context={context} "
            "increasing ints, the first of them 0: the visits of a window that leave a snapshot."
        )
    return offsets


class Motion(NamedTuple):
    """How an optimizer moves the parameters: what a `DriftNowcaster` goes by.

    Attributes:
      means: running means of the displacement between two visits, one for each memory, the latest one in them: trees
        like the parameters, in float32 or wider.
      displacement: the latest, a tree of the same kind.
      params: the parameters after the optimizer's step.
      step: int32, optimizer steps since the history began.
      snapshot_every: steps between two visits.
      num_steps: length of the training, or `None` where it is not known.
    """

    means: tuple[Any, ...]
    displacement: Any
    params: Any
    step: Any
    snapshot_every: Any
    num_steps: int | None


@runtime_checkable
class DriftNowcaster(Protocol):
    """Moves the parameters a little, and often, along the way that the optimizer takes them in the long run.

    `nowcast` visits it every `snapshot_every` steps. Let :math:`d` be how far the optimizer alone moved the parameters
    since the last visit, of which the jump of that visit is no part. Each running mean :math:`m` becomes
    :math:`m + (K / M) (d - m)` with :math:`K` = `snapshot_every` and its memory :math:`M`, and then the parameters move
    by what the nowcaster returns. Any object with these members is one; nothing needs to inherit.

    Attributes:
      snapshot_every: steps between visits, where the user gives none.
      num_means: how many running means there are, at least 1.
    """

    @property
    def snapshot_every(self) -> int: ...

    @property
    def num_means(self) -> int: ...

    def memories(self, step: Any, snapshot_every: Any) -> Sequence[Any]:
        """The memories of the running means in steps, not less than `snapshot_every`.

        Args:
          step: int32, optimizer steps since the history began.
          snapshot_every: steps between two visits.
        """
        ...

    def __call__(self, motion: Motion, roles: Any) -> Any:
        """Says how far the parameters are to move, beyond the optimizer's own step.

        Args:
          motion: how the optimizer moves them.
          roles: a tree like the parameters with a role name (see `default_roles`) at each leaf.

        Returns:
          A tree like the parameters, in float32 or wider.
        """
        ...


def is_drift(nowcaster: Any) -> "TypeIs[DriftNowcaster]":
    """Whether a nowcaster goes by a drift, rather than by a window of snapshots."""
    return is_int(getattr(nowcaster, "num_means", None)) and hasattr(nowcaster, "memories")


def check_length(history: Sequence[Any], context: int) -> None:
    """Raises a `ValueError` unless there are as many snapshots as a nowcaster predicts from."""
    if len(history) != context:
        raise ValueError(
            f"history has {len(history)} snapshots but this nowcaster has context={context}; "
            f"pass a sequence of {context} parameter trees, oldest first."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _Leafwise:
    """A nowcaster that treats every leaf on its own."""

    fn: LeafFn
    context: int
    roles: tuple[str, ...]
    takes_horizon: bool

    def __repr__(self) -> str:
        return summarize_nowcaster(self, fn=getattr(self.fn, "__qualname__", type(self.fn).__name__))

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any) -> Any:
        check_length(history, self.context)

        def predict(role: str, *leaf_history: Any) -> jax.Array:
            arrays = tuple(jnp.asarray(leaf) for leaf in leaf_history)
            if role not in self.roles:
                return arrays[-1]
            return self.fn(arrays, role, horizon).astype(arrays[-1].dtype)

        return jax.tree.map(predict, roles, *history)


def leafwise(
    fn: LeafFn,
    *,
    context: int = 5,
    roles: Collection[str] = ROLES,
    takes_horizon: bool = True,
) -> Nowcaster:
    """Makes a nowcaster from a function that predicts a single leaf.

    Args:
      fn: `fn(leaf_history, role, horizon) -> prediction`, where `leaf_history` is a tuple of `context`
        arrays, each of the leaf's shape and dtype, oldest first, and the prediction has the same shape
        (it is cast to the leaf's dtype).
      context: how many snapshots `fn` needs.
      roles: the roles that `fn` handles. A leaf with any other role comes back unchanged.
      takes_horizon: whether `fn` uses its `horizon` argument.

    Returns:
      A `Nowcaster`.

    Raises:
      ValueError: if `context` is not a positive int, or `roles` has an unknown name.

    Examples:
      Half of the last move, repeated:

      >>> import jax.numpy as jnp
      >>> import wnn_jax
      >>> momentum = wnn_jax.leafwise(lambda h, role, horizon: h[-1] + 0.5 * (h[-1] - h[-2]), context=2)
      >>> momentum([{"w": jnp.array(1.0)}, {"w": jnp.array(2.0)}], {"w": "bias"}, None)["w"].item()
      2.5
    """
    context = check_int("context", context, "the number of snapshots fn needs", minimum=1)
    if unknown := sorted(set(roles) - set(ROLES)):
        raise ValueError(f"roles={unknown} are unknown; choose from {', '.join(ROLES)}.")
    return _Leafwise(fn, context, tuple(roles), takes_horizon)


def summarize_nowcaster(nowcaster: Nowcaster, params: Any = (), **settings: Any) -> str:
    """The `repr` of a nowcaster: one short line without its weights.

    Args:
      nowcaster: what to summarize.
      params: its weights, a tree of arrays.
      **settings: what else tells it from others of its class.

    Returns:
      `ClassName(setting='value', 1,234 weights, context=5)`.
    """
    num_weights = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))
    shown = [f"{name}={value!r}" for name, value in settings.items()]
    name = type(nowcaster).__name__.lstrip("_")
    return f"{name}({', '.join([*shown, f'{num_weights:,} weights', f'context={nowcaster.context}'])})"
