"""What a nowcast has done so far, for a logger."""

from typing import Any

import jax

from wnn_jax._nowcast import NowcastState

_COUNTS = ("num_nowcasts", "num_rejected", "num_cut", "num_restarts", "num_misplaced")


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """What the nowcasts in an optimizer have done so far, as scalars for a logger.

    Args:
      opt_state: the state of an optimizer with one or more nowcasts in it, however deep. May be traced.

    Returns:
      The counts `num_nowcasts`, `num_rejected`, `num_cut`, `num_restarts` and `num_misplaced` of `NowcastState`;
      `steps_since_nowcast`, the steps taken after that of the latest jump, or all steps if there was none; and
      `last_size`, the norm of that jump beside the norm of the parameters, or 0. With several nowcasts each name is
      preceded by the place of its state in the tree, as in `inner_states/decoder/inner_state/1/num_nowcasts`.

    Raises:
      ValueError: if there is no nowcast in it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import wnn_jax
      >>> tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast("linear", snapshot_every=1))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for step in range(7):
      ...     updates, state = tx.update({"w": jnp.array([1.0, -1.0])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> counts = wnn_jax.metrics(state)
      >>> int(counts["num_nowcasts"]), int(counts["steps_since_nowcast"])
      (1, 2)
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_state)
    states = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves if _is_state(leaf)}
    if not states:
        raise ValueError(
            f"opt_state of the type {type(opt_state).__name__} has no state of wnn_jax.nowcast in it. Pass that of an "
            "optimizer with a nowcast, as `init` and `update` return it."
        )
    return {
        name if len(states) == 1 else f"{place}/{name}": value
        for place, state in states.items()
        for name, value in _of_state(state).items()
    }


def _is_state(node: Any) -> bool:
    return isinstance(node, NowcastState)


def _of_state(state: NowcastState) -> dict[str, jax.Array]:
    has_jumped = state.num_nowcasts > 0
    return {
        **{name: getattr(state, name) for name in _COUNTS},
        "steps_since_nowcast": state.count - has_jumped * (state.last_nowcast + 1),
        "last_size": state.last_size,
    }
