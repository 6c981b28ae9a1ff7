"""Training with late-phase weights as an Optax transformation."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_choice, check_float, check_int
from wnn_jax.late_phase._members import SplitParams


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
        the mean.
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
        of_base, of_member = _split_like(gradient, params)
        member = state.member

        def take(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[member], tree)

        def put(tree: Any, one: Any) -> Any:
            return jax.tree.map(lambda leaf, new: leaf.at[member].set(new.astype(leaf.dtype)), tree, one)

        member_updates, member_state = member_tx.update(of_member, take(state.members), take(params.members), **extra)
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
        of_base, of_members = _split_like(gradients, params)
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

    Momentum and counts are kept: those of the late-phase weights are given to each member.

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

    def adopt(path: Any, fresh: jax.Array) -> jax.Array:
        if path not in of_path:
            raise ValueError(
                f"plain has nothing at {jax.tree_util.keystr(path)}, which the state of tx has; base_tx and member_tx "
                "must be optimizers of the same kind as the one before."
            )
        return jnp.broadcast_to(of_path[path], fresh.shape).astype(fresh.dtype)

    fresh = cast(LatePhaseState, tx.init(cast(Any, split)))
    base, members = (jax.tree_util.tree_map_with_path(adopt, tree) for tree in (fresh.base, fresh.members))
    return fresh._replace(base=base, members=members)


def _split_like(gradient: Any, params: SplitParams) -> tuple[Any, Any]:
    """The shared and the late-phase part of a gradient."""
    if isinstance(gradient, SplitParams):
        return gradient.base, gradient.members
    is_masked = _is_masked(params.base)
    shared = jax.tree.map(lambda leaf, masked: optax.MaskedNode() if masked else leaf, gradient, is_masked)
    late = jax.tree.map(lambda leaf, masked: leaf if masked else optax.MaskedNode(), gradient, is_masked)
    return shared, late


def _is_masked(base: Any) -> Any:
    return jax.tree.map(
        lambda node: isinstance(node, optax.MaskedNode), base, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
