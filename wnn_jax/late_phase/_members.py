"""Parameters of which a few exist several times."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wnn_jax._checks import check_float, check_int
from wnn_jax._roles import default_roles
from wnn_jax._trees import norm, wide_dtype
from wnn_jax.averaging._means import mean_of

Mask = Any


class RankOne(NamedTuple):
    """Late-phase weights of rank 1: factors of a layer's inputs and outputs, one number for each.

    With them the layer's kernel is `kernel * inputs * outputs`, each factor along its own axis. That is a matrix of
    rank 1 that multiplies the kernel elementwise, and the same as to multiply what comes into the layer by `inputs` and
    what goes out, before the bias, by `outputs`.

    Attributes:
      inputs: `[inputs]`. The groups of a grouped convolution share them.
      outputs: `[outputs]`.
    """

    inputs: Any
    outputs: Any


class SplitParams(NamedTuple):
    """Parameters with late-phase weights.

    Attributes:
      base: the shared weights, a tree like the parameters with `optax.MaskedNode` where a whole weight is late-phase.
      members: the late-phase weights, with a leading axis for the members: an array where a whole weight is, a
        `RankOne` where a shared kernel has factors, and `optax.MaskedNode` elsewhere.
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


def rank_one_mask(params: Any) -> Mask:
    """The mask of the paper for networks without normalisation: factors of all kernels.

    Args:
      params: parameters of a model that `wnn_jax.default_roles` knows.

    Returns:
      A tree like the parameters, `"rank-1"` for every leaf of role `dense` or `conv`, and `False` elsewhere.

    References:
      von Oswald et al., ICLR 2021
    """
    return jax.tree.map(lambda role: "rank-1" if role in ("dense", "conv") else False, default_roles(params))


def module_mask(params: Any, path: str) -> Mask:
    """The mask of one module, such as the last layer.

    Args:
      params: parameters.
      path: of the module, its names joined by slashes, as in `"Dense_1"` or `"decoder/head"`.

    Returns:
      A tree of bools like the parameters, `True` for every leaf of the module.

    Raises:
      ValueError: if there is no such module.
    """
    names = {leaf: _path_name(leaf) for leaf, _ in jax.tree_util.tree_leaves_with_path(params)}
    if not any(name.startswith(f"{path}/") for name in names.values()):
        modules = dict.fromkeys(name.rpartition("/")[0] for name in names.values() if "/" in name)
        raise ValueError(f"path={path!r} is no module of params; choose from {', '.join(modules)}.")
    return jax.tree_util.tree_map_with_path(lambda leaf, _: names[leaf].startswith(f"{path}/"), params)


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
      mask: a tree like the parameters, or a function from the parameters to one, such as `norm_mask`. `True` makes a
        weight a late-phase weight, `"rank-1"` leaves it shared and gives it factors of 1 that are late-phase weights
        (`RankOne`; of matrices and convolution kernels), `False` leaves it as it is.
      key: a `jax.random` key, for the noise.
      noise_scale: standard deviation of the noise that tells the members apart, as a share of the root mean square of
        each tensor. The published experiments use none: the minibatches tell them apart.
      num_members: how many.

    Returns:
      The split parameters.

    Raises:
      ValueError: if the mask selects nothing or everything or is not like the parameters; if it has another value; if
        a weight cannot have factors, because it has fewer than two axes, or more, of which one cannot tell which are
        of inputs (the kernels of attention); or if a number is out of range.

    References:
      von Oswald, Kobayashi et al., `Neural Networks with Late-Phase Weights <https://arxiv.org/abs/2007.12927>`_,
      ICLR 2021; for factors, Wen et al., `BatchEnsemble <https://arxiv.org/abs/2002.06715>`_, ICLR 2020
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
    late = jax.tree_util.tree_map_with_path(_late_weights, params, mask, default_roles(params))
    base = jax.tree.map(
        lambda param, weights: param if isinstance(weights, (RankOne, optax.MaskedNode)) else optax.MaskedNode(),
        params,
        late,
    )
    if not jax.tree.leaves(late) or not jax.tree.leaves(base):
        raise ValueError(
            f"mask selects {'everything' if jax.tree.leaves(late) else 'nothing'}; select some of the weights, such as "
            "those of normalisation layers (norm_mask)."
        )

    def make_members(weights: jax.Array, key: jax.Array) -> jax.Array:
        members = jnp.broadcast_to(weights[None], (num_members, *weights.shape))
        if noise_scale == 0:
            return members
        length = norm(weights)
        noise = noise_scale * length / max(weights.size, 1) ** 0.5 * jax.random.normal(key, members.shape, length.dtype)
        return (members + noise).astype(weights.dtype)

    leaves, structure = jax.tree.flatten(late)
    keys = jax.random.split(key, len(leaves))
    return SplitParams(base, jax.tree.unflatten(structure, list(map(make_members, leaves, keys))))


def _late_weights(path: Any, param: jax.Array, choice: Any, role: str) -> Any:
    """The late-phase weights of a leaf of the parameters, as the mask wants them."""
    if not isinstance(choice, str):
        return param if choice else optax.MaskedNode()
    if choice != "rank-1":
        raise ValueError(f"mask is {choice!r} at {_path_name(path)}; choose from True, False and 'rank-1'.")
    if param.ndim < 2 or (param.ndim > 2 and role != "conv"):
        raise ValueError(
            f"mask is 'rank-1' at {_path_name(path)}, whose shape {param.shape} is not that of a matrix or of a "
            "convolution kernel, with one axis of inputs and one of outputs; choose True or False there."
        )
    return RankOne(*(jnp.ones(param.shape[axis], param.dtype) for axis in _factor_axes(path)))


def _factor_axes(path: Any) -> tuple[int, int]:
    """A kernel's axes of inputs and outputs: Equinox has them first and calls it `weight`, Flax and Haiku last."""
    return (1, 0) if _path_name(path[-1:]) == "weight" else (-2, -1)


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    """The ordinary parameters of the shared weights and of the late-phase weights of one member."""
    return jax.tree_util.tree_map_with_path(_merge_leaf, base, member, is_leaf=_is_masked)


def split_gradient(gradient: Any, base: Any, member: Any) -> tuple[Any, Any]:
    """The gradients by the shared and by the late-phase weights, from that by the parameters that `merge` makes.

    Args:
      gradient: like the parameters.
      base: the shared weights.
      member: the late-phase weights of the member whose gradient it is.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(base, is_leaf=_is_masked)

    def split(shared: tuple[Any, Any], late: Any, gradient: Any) -> tuple[Any, Any]:
        weights = jax.tree.map(lambda leaf: leaf.astype(gradient.dtype), (shared[1], late))
        _, pullback = jax.vjp(functools.partial(_merge_leaf, shared[0]), *weights)
        return pullback(gradient)

    parts = map(split, leaves, structure.flatten_up_to(member), structure.flatten_up_to(gradient))
    of_base, of_member = zip(*parts, strict=True)
    return structure.unflatten(of_base), structure.unflatten(of_member)


def _merge_leaf(path: Any, shared: Any, late: Any) -> Any:
    if isinstance(shared, optax.MaskedNode):
        return late
    if isinstance(late, optax.MaskedNode):
        return shared
    for factors, axis in zip(late, _factor_axes(path), strict=True):
        shape = [1] * shared.ndim
        shape[axis] = factors.size
        shared = shared * factors.reshape(shape)
    return shared


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


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
      and variance one by one would not be. Everything else is averaged as it is, factors of rank 1 before they are
      folded into their kernel. A weight that is not finite in one
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
    stacked = jax.vmap(functools.partial(merge, split.base))(split.members)
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


def ensemble_predict(
    apply_fn: Callable[..., jax.Array], split: SplitParams, inputs: Any, batch_stats: Any = None
) -> jax.Array:
    """The mean of the members' predictions.

    Args:
      apply_fn: `(params, inputs) -> predictions`, of one member: probabilities, for an average of these. With
        `batch_stats`, `(params, inputs, batch_stats) -> predictions`.
      split: the parameters.
      inputs: what all members are given.
      batch_stats: statistics of batch normalisation with a leading axis for the members, or `None` if there are none
        or the members share them.

    Returns:
      Predictions like those of one.
    """

    def predict(member: Any, *own_stats: Any) -> jax.Array:
        return apply_fn(merge(split.base, member), inputs, *own_stats)

    stats = () if batch_stats is None else (batch_stats,)
    return jax.vmap(predict)(split.members, *stats).mean(axis=0)
