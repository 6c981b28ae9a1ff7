"""Training with late-phase weights as an Optax transformation."""

import functools
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_choice, check_float, check_int
from wnn_jax._guards import Landmark
from wnn_jax._nowcast import NowcastState
from wnn_jax.late_phase._members import RankOne, SplitParams, split_gradient


class LatePhaseState(NamedTuple):
    """State of `late_phase`.

    Attributes:
      member: int32, the member whose turn it is: give its gradient next.
      gradient: the sum so far of the shared weights' gradients; nothing for the schedule `"parallel"`.
      base: the state of `base_tx`.
      members: the states of `member_tx`, with a leading axis for the members.
    """

    member: jax.Array
    gradient: Any
    base: Any
    members: Any


def late_phase(
    base_tx: optax.GradientTransformation,
    member_tx: optax.GradientTransformation,
    num_members: int,
    base_gradient_scale: float = 1.0,
    *,
    schedule: Literal["cycle", "parallel"] = "cycle",
) -> optax.GradientTransformationExtraArgs:
    """Trains shared weights and several members of a few late-phase weights.

    Every member has minibatches of its own. Its late-phase weights take a step with each; the shared weights take one
    step with the sum of the gradients of a whole cycle of members.

    With the schedule `"cycle"` an update is that of one member, and takes an ordinary gradient, like the parameters::

        params = select_member(split, state.member)
        updates, state = tx.update(jax.grad(loss)(params, batch), state, split)
        split = optax.apply_updates(split, updates)

    With `"parallel"` it is that of a whole cycle, and takes the gradients of all members, with a leading axis for
    them::

        gradients = jax.vmap(lambda k, batch: jax.grad(loss)(select_member(split, k), batch))(jnp.arange(K), batches)
        updates, state = tx.update(gradients, state, split)

    Both give the same weights. The moments of members whose turn it is not stay as they are, too.

    Args:
      base_tx: the optimizer of the shared weights.
      member_tx: the optimizer of the late-phase weights.
      num_members: how many members there are.
      base_gradient_scale: multiplies the sum of gradients: 1 as the paper does on CIFAR, `1 / num_members` for
        the mean. A network without normalisation layers may not bear steps of SGD that are `num_members` times as
        long: give it the mean (`experiments/late_phase_rank_one.py`).
      schedule: `"cycle"` or `"parallel"`.

    Returns:
      A transformation of `SplitParams` with a `LatePhaseState`.

    Raises:
      ValueError: if an argument is out of its range; at `init`, if the parameters have another number of members; at
        `update`, if `params` is missing.

    References:
      von Oswald, Kobayashi et al., `Neural Networks with Late-Phase Weights <https://arxiv.org/abs/2007.12927>`_,
      ICLR 2021
    """
    num_members = check_int("num_members", num_members, "how many members there are", minimum=1)
    base_gradient_scale = check_float(
        "base_gradient_scale", base_gradient_scale, "what multiplies the sum of the gradients of all members"
    )
    check_choice("schedule", schedule, ("cycle", "parallel"), "whether an update is of one member or of all")
    base_tx, member_tx = optax.with_extra_args_support(base_tx), optax.with_extra_args_support(member_tx)

    def init_fn(params: SplitParams) -> LatePhaseState:
        if params.num_members != num_members:
            raise ValueError(
                f"params has {params.num_members} members, and num_members={num_members}; split_members makes them."
            )
        gradient = jax.tree.map(jnp.zeros_like, params.base) if schedule == "cycle" else ()
        return LatePhaseState(
            jnp.zeros([], jnp.int32), gradient, base_tx.init(params.base), jax.vmap(member_tx.init)(params.members)
        )

    def update_cycle(gradient: Any, state: LatePhaseState, params: SplitParams, extra: Any) -> Any:
        member = state.member

        def take(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[member], tree)

        def put(tree: Any, one: Any) -> Any:
            return jax.tree.map(lambda leaf, new: leaf.at[member].set(new.astype(leaf.dtype)), tree, one)

        own = take(params.members)
        of_base, of_member = (
            gradient if isinstance(gradient, SplitParams) else split_gradient(gradient, params.base, own)
        )
        member_updates, member_state = member_tx.update(of_member, take(state.members), own, **extra)
        total = jax.tree.map(jnp.add, state.gradient, of_base)
        is_last = member == num_members - 1

        def step(total: Any, base_state: Any) -> Any:
            scaled = jax.tree.map(lambda leaf: base_gradient_scale * leaf, total)
            updates, base_state = base_tx.update(scaled, base_state, params.base, **extra)
            return updates, base_state, jax.tree.map(jnp.zeros_like, total)

        def wait(total: Any, base_state: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, params.base), base_state, total

        updates, base_state, total = jax.lax.cond(is_last, step, wait, total, state.base)
        no_updates = jax.tree.map(jnp.zeros_like, params.members)
        return SplitParams(updates, put(no_updates, member_updates)), LatePhaseState(
            jnp.where(is_last, 0, member + 1), total, base_state, put(state.members, member_state)
        )

    def update_parallel(gradients: Any, state: LatePhaseState, params: SplitParams, extra: Any) -> Any:
        if not isinstance(gradients, SplitParams):
            split = jax.vmap(split_gradient, in_axes=(0, None, 0))
            gradients = split(gradients, params.base, params.members)
        of_base, of_members = gradients
        scaled = jax.tree.map(lambda leaf: base_gradient_scale * leaf.sum(axis=0), of_base)
        updates, base_state = base_tx.update(scaled, state.base, params.base, **extra)
        member_updates, member_states = jax.vmap(
            lambda gradient, state, params: member_tx.update(gradient, state, params, **extra)
        )(of_members, state.members, params.members)
        return SplitParams(updates, member_updates), LatePhaseState(state.member, (), base_state, member_states)

    def update_fn(
        updates: Any, state: LatePhaseState, params: SplitParams | None = None, **extra_args: Any
    ) -> tuple[SplitParams, LatePhaseState]:
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        update = update_cycle if schedule == "cycle" else update_parallel
        return update(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def migrate_state(plain: Any, tx: optax.GradientTransformationExtraArgs, split: SplitParams) -> LatePhaseState:
    """The state of `late_phase` that goes on from that of an ordinary training, at `T0`.

    Momentum and counts are kept: those of the late-phase weights are given to each member. Factors of rank 1 are new
    weights, and so are their moments, the counts that correct these, and the history of a `wnn_jax.nowcast`.

    Args:
      plain: the state of the optimizer so far, of ordinary parameters, of the same kind as both `base_tx` and
        `member_tx` of `tx`.
      tx: from `late_phase`.
      split: the parameters, from `split_members`.

    Returns:
      A state for `tx`.

    Raises:
      ValueError: if `plain` lacks something that the state of `tx` has.
    """
    of_path = dict(jax.tree_util.tree_leaves_with_path(plain))
    fresh = cast(LatePhaseState, tx.init(cast(Any, split)))

    def adopt(new: Collection[Any], path: Any, leaf: Any) -> Any:
        # A nowcast looks for its parameters by some of their tensors, which are others now.
        if isinstance(leaf, Landmark) or any(path[: len(place)] == place for place in new):
            return leaf
        if path not in of_path:
            raise ValueError(
                f"plain has nothing at {jax.tree_util.keystr(path)}, which the state of tx has; base_tx and member_tx "
                "must be optimizers of the same kind as the one before."
            )
        return jnp.broadcast_to(of_path[path], leaf.shape).astype(leaf.dtype)

    def migrate(tree: Any, new: Collection[Any]) -> Any:
        return jax.tree_util.tree_map_with_path(
            functools.partial(adopt, new), tree, is_leaf=lambda node: isinstance(node, Landmark)
        )

    of_factors = _states_of_factors(fresh.members, split.members)
    return fresh._replace(base=migrate(fresh.base, ()), members=migrate(fresh.members, of_factors))


def _states_of_factors(state: Any, members: Any) -> set[Any]:
    """The places in the members' state of what holds something, such as moments or a history, of factors of rank 1."""

    def paths_of(kind: Any, tree: Any) -> dict[Any, Any]:
        nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
        return {path: node for path, node in nodes if isinstance(node, kind)}

    names = paths_of(RankOne, members)
    moments = {
        path[: -len(name) - 1] for path in paths_of(RankOne, state) for name in names if path[-len(name) :] == name
    }
    return moments | {path for path, node in paths_of(NowcastState, state).items() if paths_of(RankOne, node)}
