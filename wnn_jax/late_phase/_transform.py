"""Training with late-phase weights as an Optax transformation."""

import functools
import itertools
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
      member: int32, the member whose gradient the next update takes.
      gradient: the sum of the shared weights' gradients so far; empty for the schedule `"parallel"`.
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
    """Train shared weights and several members of a few late-phase weights.

    Every member has its own minibatches, and its late-phase weights take a step with each. The shared weights take one
    step with the sum of the gradients of all members. Both schedules give the same weights.

    With the schedule `"cycle"`, an update is for one member and takes an ordinary gradient, like the parameters::

        params = select_member(split, state.member)
        updates, state = tx.update(jax.grad(loss)(params, batch), state, split)
        split = optax.apply_updates(split, updates)

    With `"parallel"`, it is for all members and takes their gradients with a leading axis for the members::

        gradients = jax.vmap(lambda k, batch: jax.grad(loss)(select_member(split, k), batch))(jnp.arange(K), batches)
        updates, state = tx.update(gradients, state, split)

    Args:
      base_tx: the optimizer of the shared weights.
      member_tx: the optimizer of the late-phase weights.
      num_members: how many members there are.
      base_gradient_scale: multiplies the sum of gradients: 1 as in the paper on CIFAR, `1 / num_members` for the mean.
        Use the mean for a network without normalisation layers, which may diverge with longer steps.
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
    meaning = "what multiplies the sum of the gradients of all members"
    base_gradient_scale = check_float("base_gradient_scale", base_gradient_scale, meaning)
    check_choice("schedule", schedule, ("cycle", "parallel"), "whether an update is of one member or of all")
    base_tx, member_tx = optax.with_extra_args_support(base_tx), optax.with_extra_args_support(member_tx)

    def init_fn(params: SplitParams) -> LatePhaseState:
        if params.num_members != num_members:
            raise ValueError(
                f"params has {params.num_members} members, and num_members={num_members}; split_members makes them."
            )
        gradient = optax.tree.zeros_like(params.base) if schedule == "cycle" else ()
        members = jax.vmap(member_tx.init)(params.members)
        return LatePhaseState(jnp.zeros([], jnp.int32), gradient, base_tx.init(params.base), members)

    def update_base(gradient: Any, state: Any, params: SplitParams, extra: Any) -> Any:
        return base_tx.update(optax.tree.scale(base_gradient_scale, gradient), state, params.base, **extra)

    def update_cycle(gradient: Any, state: LatePhaseState, params: SplitParams, extra: Any) -> Any:
        member = state.member

        def take(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[member], tree)

        def put(tree: Any, one: Any) -> Any:
            return jax.tree.map(lambda leaf, new: leaf.at[member].set(new.astype(leaf.dtype)), tree, one)

        own = take(params.members)
        base_gradient, member_gradient = split_gradient(gradient, params.base, own)
        member_updates, member_state = member_tx.update(member_gradient, take(state.members), own, **extra)
        total = optax.tree.add(state.gradient, base_gradient)
        is_last = member == num_members - 1

        def step(total: Any, base_state: Any) -> Any:
            return *update_base(total, base_state, params, extra), optax.tree.zeros_like(total)

        def wait(total: Any, base_state: Any) -> Any:
            return no_updates.base, base_state, total

        no_updates = optax.tree.zeros_like(params)
        updates, base_state, total = jax.lax.cond(is_last, step, wait, total, state.base)
        new_state = jnp.where(is_last, 0, member + 1), total, base_state, put(state.members, member_state)
        return SplitParams(updates, put(no_updates.members, member_updates)), LatePhaseState(*new_state)

    def update_parallel(gradients: Any, state: LatePhaseState, params: SplitParams, extra: Any) -> Any:
        split = jax.vmap(split_gradient, in_axes=(0, None, 0))
        base_gradients, member_gradients = split(gradients, params.base, params.members)
        total = jax.tree.map(lambda leaf: leaf.sum(axis=0), base_gradients)
        updates, base_state = update_base(total, state.base, params, extra)
        update_members = jax.vmap(lambda *arguments: member_tx.update(*arguments, **extra))
        member_updates, member_states = update_members(member_gradients, state.members, params.members)
        return SplitParams(updates, member_updates), LatePhaseState(state.member, (), base_state, member_states)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[SplitParams, LatePhaseState]:
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        update = update_cycle if schedule == "cycle" else update_parallel
        return update(updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def migrate_state(plain: Any, tx: optax.GradientTransformationExtraArgs, split: SplitParams) -> LatePhaseState:
    """Return the state of `late_phase` that continues from the state of an ordinary training run.

    Every member gets the momentum and the counts of its late-phase weights. Factors of rank 1 are new weights, so their
    moments, their counts and the history of their `wnn_jax.nowcast` start from scratch.

    Args:
      plain: the optimizer's state so far, for ordinary parameters. The optimizer is of the same kind as `base_tx` and
        `member_tx` of `tx`.
      tx: from `late_phase`.
      split: the parameters, from `split_members`.

    Raises:
      ValueError: if `plain` lacks something that the state of `tx` has.
    """
    old = dict(jax.tree_util.tree_leaves_with_path(plain))
    fresh = cast(LatePhaseState, tx.init(cast(Any, split)))
    new = _states_of_factors(fresh.members, split.members)

    def adopt(path: Any, leaf: Any, new: Any = ()) -> Any:
        # A landmark is made of some tensors of the parameters. These are other tensors now.
        if isinstance(leaf, Landmark) or any(path[: len(place)] == place for place in new):
            return leaf
        if path not in old:
            raise ValueError(
                f"plain has nothing at {jax.tree_util.keystr(path)}, which the state of tx has; base_tx and member_tx "
                "must be optimizers of the same kind as the one before."
            )
        return jnp.broadcast_to(old[path], leaf.shape).astype(leaf.dtype)

    adopt_all = functools.partial(jax.tree_util.tree_map_with_path, is_leaf=lambda node: isinstance(node, Landmark))
    members = adopt_all(functools.partial(adopt, new=new), fresh.members)
    return fresh._replace(base=adopt_all(adopt, fresh.base), members=members)


def _states_of_factors(state: Any, members: Any) -> set[Any]:
    """Return the paths in the members' state to moments and histories of factors of rank 1."""

    def paths_of(kind: Any, tree: Any) -> dict[Any, Any]:
        nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
        return {path: node for path, node in nodes if isinstance(node, kind)}

    factors = itertools.product(paths_of(RankOne, state), paths_of(RankOne, members))
    moments = {path[: -len(name) - 1] for path, name in factors if path[-len(name) :] == name}
    return moments | {path for path, node in paths_of(NowcastState, state).items() if paths_of(RankOne, node)}
