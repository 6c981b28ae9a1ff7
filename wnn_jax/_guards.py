"""Keep jumps safe: counters, checks of parameters and forecasts, and a check of where the parameters are."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from wnn_jax._trees import apply_updates, choose, norm

# All counters stop here.
MAX_COUNT = 2**31 - 1

# Every step checks a few small tensors only, because whatever moves parameters unnoticed moves all of them.
_NUM_TENSORS = 4
_SMALL = 1024
# Parameters are misplaced if they are further away than this share of the last update.
_SHARE = 0.25
# Rounding errors, in units of the last place: of weights in their own dtype, and of sums in float32.
_ROUNDING, _ROUNDING_OF_SUMS = 4.0, 16.0

_MISPLACED = (
    "the parameters are not where the last update of wnn_jax.nowcast led: a transformation after it in the chain "
    "changes its updates, or the parameters were edited, or restored without the state of the optimizer. Put nowcast "
    "last in the chain. Its history began again; num_misplaced in wnn_jax.metrics counts such steps."
)


class Visit(NamedTuple):
    """The visit to the history that may be due at a step."""

    is_first: jax.Array  # Whether the parameters before this step are unknown.
    is_due: jax.Array
    num_snapshots: jax.Array  # The visits so far.
    snapshot_every: Any
    horizon: Any
    scale: Any


class Jump(NamedTuple):
    """What became of a forecast: a jump, or a rejection."""

    is_accepted: jax.Array
    num_cut: jax.Array  # The weights that the bound held back.
    size: jax.Array  # The norm of the jump relative to the norm of the parameters that move, float32.


class Outcome(NamedTuple):
    """The result of a step, and of the forecast if there was one."""

    updates: Any
    history: Any
    num_snapshots: jax.Array  # The visits so far, if one was due.
    is_jump: jax.Array
    jump: Jump


class Counters(NamedTuple):
    """What `nowcast` has done so far; see `wnn_jax.metrics`. All counters are int32 and stop at 2147483647."""

    num_nowcasts: jax.Array
    num_rejected: jax.Array
    num_cut: jax.Array
    num_restarts: jax.Array
    num_misplaced: jax.Array
    last_nowcast: jax.Array  # The step of the last jump.
    last_size: jax.Array  # Its size, float32.

    @classmethod
    def zero(cls) -> "Counters":
        """Return counters at the beginning, each in a buffer of its own so that the state can be donated."""
        return cls(*(jnp.zeros([], jnp.float32 if name == "last_size" else jnp.int32) for name in cls._fields))

    def after(self, step: jax.Array, outcome: Outcome, *, is_restart: jax.Array, is_misplaced: jax.Array) -> "Counters":
        """Return the counters after a step."""
        jump, is_rejected = outcome.jump, outcome.is_jump & ~outcome.jump.is_accepted
        last_nowcast, last_size = choose(jump.is_accepted, (step, jump.size), (self.last_nowcast, self.last_size))
        return Counters(
            num_nowcasts=add_counts(self.num_nowcasts, jump.is_accepted),
            num_rejected=add_counts(self.num_rejected, is_rejected),
            num_cut=add_counts(self.num_cut, jump.num_cut),
            num_restarts=add_counts(self.num_restarts, is_restart),
            num_misplaced=add_counts(self.num_misplaced, is_misplaced),
            last_nowcast=last_nowcast,
            last_size=last_size,
        )


def no_jump() -> Jump:
    """Return the jump of a step without one."""
    return Jump(jnp.array(False), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))


def relative_size(moves: jax.Array, params: jax.Array) -> jax.Array:
    """Return the norm of a jump relative to the norm of the parameters, from the norms of their leaves, as float32."""
    of_params = norm(params)
    return (norm(moves) / jnp.maximum(of_params, jnp.finfo(of_params.dtype).tiny)).astype(jnp.float32)


def add_counts(count: jax.Array, more: jax.Array) -> jax.Array:
    """Return the sum of two int32 counts, or the largest int32."""
    return count + jnp.minimum(more, MAX_COUNT - count)


def check_params(params: Any) -> None:
    """Raise a `ValueError` unless all parameters are real floating-point arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = jax.tree_util.keystr(path) or "its root"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise ValueError(
                f"params has a leaf of type {type(leaf).__name__} at {place}, and only arrays can be forecast. Of an "
                "Equinox model take the arrays: eqx.filter(model, eqx.is_inexact_array)."
            ) from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params has a leaf of dtype {dtype} at {place}, and only real floating-point parameters can be "
                "forecast. Leave such leaves out with optax.masked or optax.partition."
            )


def check_prediction(prediction: Any, params: Any) -> None:
    """Raise a `ValueError` unless a nowcaster returned a tree like the parameters."""
    returned, expected = (jax.tree.map(jnp.shape, tree) for tree in (prediction, params))
    # Structures and leaves, not trees: a node of a user's class need not define equality.
    if jax.tree.flatten(returned) != jax.tree.flatten(expected):
        raise ValueError(
            f"the nowcaster returned the shapes {returned} for parameters of the shapes {expected}; it must return a "
            "tree like the parameters."
        )


def make_warning() -> Callable[[jax.Array], None]:
    """Return a function that warns once, outside of `jit`, if the parameters are misplaced."""
    has_warned = False

    def warn(is_misplaced: jax.Array) -> None:
        nonlocal has_warned
        if not (has_warned or isinstance(is_misplaced, jax.core.Tracer)) and is_misplaced:
            has_warned = True
            warnings.warn(_MISPLACED, stacklevel=4)

    return warn


class Landmark(NamedTuple):
    """Where the last update led. So `nowcast` notices when something else moves the parameters."""

    position: jax.Array  # See `position_of`.
    tolerance: jax.Array  # How far from there the parameters may be, float32. Infinite before the first step.

    @classmethod
    def unknown(cls, params: Any) -> "Landmark":
        """Return a landmark that no parameters miss."""
        return cls(jnp.zeros([len(_some_leaves(params)), 3], jnp.float32), jnp.full([], jnp.inf, jnp.float32))

    @classmethod
    def after(cls, params: Any, updates: Any, position: jax.Array) -> "Landmark":
        """Return the place to which these updates lead from these parameters, which are at this position."""
        after = apply_updates(_some_leaves(params), _some_leaves(updates))
        there = position_of(after)
        largest = jnp.where(_is_known(there), jnp.max(jnp.abs(there[:, 1:]), axis=1), 0)
        # How far rounding alone may move a position. The errors of weights are independent: their squares add up.
        shares = [
            _ROUNDING * float(jnp.finfo(leaf.dtype).eps) * math.sqrt(leaf.size)
            + _ROUNDING_OF_SUMS * float(jnp.finfo(jnp.float32).eps) * leaf.size
            for leaf in after
        ]
        rounding = jnp.sum(jnp.array(shares, jnp.float32) * largest)
        return cls(there, _SHARE * _distance(there, position) + rounding)

    def is_missed(self, position: jax.Array) -> jax.Array:
        """Tell whether parameters at this position are somewhere else: a bool scalar."""
        is_far = _distance(position, self.position) > self.tolerance
        # A tensor that is finite again after a step that was not finite has been moved, too.
        return is_far | jnp.any(_is_known(position) & ~_is_known(self.position))


def position_of(params: Any) -> jax.Array:
    """Return the sum, the maximum and the minimum of a few small tensors, float32 `[tensors, 3]`."""
    # Devices exchange these three numbers and nothing else, whatever the sharding.
    numbers = [
        number.astype(jnp.float32)
        for leaf in _some_leaves(params)
        for number in (jnp.sum(leaf, dtype=jnp.float32), jnp.max(leaf), jnp.min(leaf))
    ]
    return jnp.asarray(numbers, jnp.float32).reshape(-1, 3)


def _some_leaves(tree: Any) -> list[Any]:
    """Return a few small leaves from all over a tree, or some of the smallest if none is small."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if math.prod(jnp.shape(leaf))]
    sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
    limit = max(_SMALL, min(sizes, default=0))
    small = [leaf for leaf, size in zip(leaves, sizes, strict=True) if size <= limit]
    return small[:: max(-(-len(small) // _NUM_TENSORS), 1)]


def _is_known(position: jax.Array) -> jax.Array:
    """Tell which tensors have a finite position: bool `[tensors]`."""
    return jnp.all(jnp.isfinite(position), axis=1)


def _distance(position: jax.Array, other: jax.Array) -> jax.Array:
    """Return the distance of two positions, over the tensors for which both are finite."""
    is_known = _is_known(position) & _is_known(other)
    return jnp.linalg.norm(jnp.where(is_known[:, None], position - other, 0))
