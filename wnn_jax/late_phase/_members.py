"""Parameters of which a few exist several times."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wnn_jax._checks import check_float, check_int
from wnn_jax._history import wide_dtype
from wnn_jax._norm import norm
from wnn_jax._roles import default_roles
from wnn_jax.averaging._means import mean_of

Mask = Any


class SplitParams(NamedTuple):
    """Parameters with late-phase weights.

    Attributes:
      base: the shared weights, a tree like the parameters with `optax.MaskedNode` where late-phase weights are.
      members: the late-phase weights, with a leading axis for the members, and `optax.MaskedNode` elsewhere.
    """

    base: Any
    members: Any

    @property
    def num_members(self) -> int:
        """How many members there are."""
        return jax.tree.leaves(self.members)[0].shape[0]


def norm_mask(params: Any) -> Mask:
    """The mask of the paper for networks with normalisation: its scales and shifts.

    Args:
      params: parameters of a model that `wnn_jax.default_roles` knows.

    Returns:
      A tree of bools like the parameters, `True` for every leaf of a module that has a leaf of role `norm`.

    References:
      von Oswald et al., ICLR 2021
    """
    roles = jax.tree_util.tree_leaves_with_path(default_roles(params))
    of_norms = {path[:-1] for path, role in roles if role == "norm"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[:-1] in of_norms, params)


def split_members(
    params: Any,
    mask: Mask | Callable[[Any], Mask],
    key: jax.Array,
    noise_scale: float = 0.0,
    *,
    num_members: int,
) -> SplitParams:
    """Makes several members of some of the weights, in the middle of a training.

    Args:
      params: ordinary parameters.
      mask: a tree of bools like the parameters, `True` for late-phase weights, or a function from the parameters to
        one, such as `norm_mask`.
      key: a `jax.random` key, for the noise.
      noise_scale: standard deviation of the noise that tells the members apart, as a share of the root mean square of
        each tensor. The published experiments use none: the minibatches tell them apart.
      num_members: how many.

    Returns:
      The split parameters.

    Raises:
      ValueError: if the mask selects nothing or everything or is not like the parameters, or a number is out of range.

    References:
      von Oswald, Kobayashi et al., `Neural Networks with Late-Phase Weights <https://arxiv.org/abs/2007.12927>`_,
      ICLR 2021
    """
    num_members = check_int("num_members", num_members, "how many members to make", minimum=1)
    meaning = "the standard deviation of the noise, as a share of the root mean square of each tensor"
    noise_scale = check_float("noise_scale", noise_scale, meaning, minimum=0)
    mask = mask(params) if callable(mask) else mask
    if jax.tree.structure(mask) != jax.tree.structure(params):
        raise ValueError(
            f"mask has the structure {jax.tree.structure(mask)}, and params {jax.tree.structure(params)}; give a tree "
            "of bools like the parameters."
        )
    selected = [bool(leaf) for leaf in jax.tree.leaves(mask)]
    if all(selected) or not any(selected):
        raise ValueError(
            f"mask selects {'everything' if all(selected) else 'nothing'}; select some of the weights, such as those "
            "of normalisation layers (norm_mask)."
        )
    keys = jax.tree.unflatten(jax.tree.structure(params), list(jax.random.split(key, len(selected))))

    def make_members(param: jax.Array, is_late: bool, key: jax.Array) -> Any:
        if not is_late:
            return optax.MaskedNode()
        members = jnp.broadcast_to(param[None], (num_members, *param.shape))
        if noise_scale == 0:
            return members
        length = norm(param)
        noise = noise_scale * length / max(param.size, 1) ** 0.5 * jax.random.normal(key, members.shape, length.dtype)
        return (members + noise).astype(param.dtype)

    return SplitParams(
        base=jax.tree.map(lambda param, is_late: optax.MaskedNode() if is_late else param, params, mask),
        members=jax.tree.map(make_members, params, mask, keys),
    )


def select_member(split: SplitParams, member: Any) -> Any:
    """The ordinary parameters of one member.

    Args:
      split: from `split_members`.
      member: its index, an int, or a traced one, which is brought into range.

    Returns:
      Parameters, as if there had never been others.

    Raises:
      ValueError: if `member` is an int out of range.
    """
    number = split.num_members
    if not isinstance(member, jax.Array):
        check_int("member", member, f"there are {number} members", minimum=0, maximum=number - 1)
    index = jnp.clip(jnp.asarray(member), 0, number - 1)
    return merge(split.base, jax.tree.map(lambda leaf: leaf[index], split.members))


def merge(base: Any, member: Any) -> Any:
    """One tree of two that have their masked nodes in each other's places."""
    return jax.tree.map(
        lambda one, other: other if isinstance(one, optax.MaskedNode) else one,
        base,
        member,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def average_members(split: SplitParams, batch_stats: Any = None, epsilon: float = 1e-5) -> tuple[Any, Any]:
    r"""One network from all members, at the end.

    Args:
      split: the trained parameters.
      batch_stats: statistics of batch normalisation with a leading axis for the members, or `None` if there are none
        or the members share them. A module at the same path in `params` has a `scale` or a `bias` or both; one in
        `batch_stats` a `mean` and a `var`.
      epsilon: that of the normalisation layers.

    Returns:
      Ordinary parameters, and `batch_stats` without the leading axis. With statistics of their own, the affine maps
      :math:`x \mapsto s_k x + t_k` that batch normalisation is at test time are averaged,
      :math:`s_k = g_k / \sqrt{v_k + \epsilon}` and :math:`t_k = b_k - s_k m_k`, which averages of scale, shift, mean
      and variance one by one would not be. Everything else is averaged as it is. A weight that is not finite in one
      member is not finite in the average: look at that member, with `select_member`.

    Raises:
      ValueError: if `epsilon` is no float >= 0; if `batch_stats` has another number of members, or a module without
        `mean` and `var`.

    References:
      von Oswald et al., ICLR 2021
    """
    epsilon = check_float("epsilon", epsilon, "that of the normalisation layers", minimum=0)
    mean_params = merge(split.base, jax.tree.map(_mean, split.members))
    if batch_stats is None:
        return mean_params, None
    number = split.num_members
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        if leaf.shape[:1] != (number,):
            raise ValueError(
                f"batch_stats has the shape {leaf.shape} at {jax.tree_util.keystr(path)}; its first axis must be the "
                f"{number} members."
            )
    mean_stats = jax.tree.map(_mean, batch_stats)
    stacked = merge(
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (number, *leaf.shape)), split.base), split.members
    )
    return _fold(mean_params, stacked, mean_stats, batch_stats, epsilon, ()), mean_stats


def _fold(params: Any, members: Any, mean_stats: Any, stats: Any, epsilon: float, path: tuple[str, ...]) -> Any:
    """The parameters with averages of affine maps at the paths of batch normalisation."""
    folded = dict(params)
    for name, of_module in stats.items():
        if isinstance(of_module, Mapping) and not {"mean", "var"} <= set(of_module):
            if not of_module or not all(isinstance(child, Mapping) for child in of_module.values()):
                raise ValueError(f"batch_stats has no `mean` and `var` at {'/'.join((*path, name))}.")
            folded[name] = _fold(params[name], members[name], mean_stats[name], of_module, epsilon, (*path, name))
            continue
        layer = dict(params.get(name, {}))
        own = members.get(name, {})
        means, variances, mean, variance = (
            module[moment].astype(wide_dtype(module[moment]))
            for module in (of_module, mean_stats[name])
            for moment in ("mean", "var")
        )
        slopes = own.get("scale", 1.0) / jnp.sqrt(variances + epsilon)
        shifts = own.get("bias", 0.0) - slopes * means
        slope = 1 / jnp.sqrt(variance + epsilon)
        if "scale" in layer:
            slope = _mean(slopes)
            layer["scale"] = (slope * jnp.sqrt(variance + epsilon)).astype(layer["scale"].dtype)
        if "bias" in layer:
            layer["bias"] = (_mean(shifts) + slope * mean).astype(layer["bias"].dtype)
        folded[name] = layer
    return folded


@jax.jit
def _mean(members: jax.Array) -> jax.Array:
    return mean_of(jnp.unstack(members)).astype(members.dtype)


def ensemble_predict(apply_fn: Callable[[Any, Any], jax.Array], split: SplitParams, inputs: Any) -> jax.Array:
    """The mean of the members' predictions.

    Args:
      apply_fn: `(params, inputs) -> predictions`, of one member: probabilities, for an average of these.
      split: the parameters.
      inputs: what all members are given.

    Returns:
      Predictions like those of one.
    """

    def predict(member: Any) -> jax.Array:
        return apply_fn(merge(split.base, member), inputs)

    return jax.vmap(predict)(split.members).mean(axis=0)
