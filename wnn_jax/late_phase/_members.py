"""Parameters with a few weights that every member of an ensemble has for itself."""

import functools
from collections.abc import Callable
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
    """Late-phase weights of rank 1: a factor for each input and each output of a layer.

    The layer's kernel is then `kernel * inputs * outputs`, each along its own axis. This is the same as multiplying
    what enters the layer by `inputs`, and what leaves it, before the bias, by `outputs`. The groups of a grouped
    convolution share the `inputs`.
    """

    inputs: Any
    outputs: Any


class SplitParams(NamedTuple):
    """Parameters with late-phase weights.

    Attributes:
      base: the shared weights, a tree like the parameters, with `optax.MaskedNode` in place of late-phase weights.
      members: the late-phase weights, with a leading axis for the members: an array for a whole weight, a `RankOne` for
        a shared kernel with factors, and `optax.MaskedNode` elsewhere.
    """

    base: Any
    members: Any

    @property
    def num_members(self) -> int:
        """The number of members."""
        return jax.tree.leaves(self.members)[0].shape[0]


def norm_mask(params: Any) -> Mask:
    """Return the mask for networks with normalisation: their scales and shifts (von Oswald et al., ICLR 2021).

    It is `True` for every leaf of a module that has a leaf of role `norm`.

    Args:
      params: parameters of a model that `wnn_jax.default_roles` knows.
    """
    roles = jax.tree_util.tree_leaves_with_path(default_roles(params))
    modules = {path[:-1] for path, role in roles if role == "norm"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[:-1] in modules, params)


def rank_one_mask(params: Any) -> Mask:
    """Return the mask for networks without normalisation: factors of all kernels (von Oswald et al., ICLR 2021).

    It is `"rank-1"` for every leaf of role `dense` or `conv`, and `False` elsewhere.

    Args:
      params: parameters of a model that `wnn_jax.default_roles` knows.
    """
    return jax.tree.map(lambda role: "rank-1" if role in ("dense", "conv") else False, default_roles(params))


def module_mask(params: Any, path: str) -> Mask:
    """Return the mask of one module, such as the last layer: `True` for every leaf of the module.

    Args:
      params: parameters.
      path: the names that lead to the module, joined by slashes, such as `"Dense_1"` or `"decoder/head"`.

    Raises:
      ValueError: if there is no such module.
    """
    mask = jax.tree_util.tree_map_with_path(lambda leaf, _: _path_name(leaf).startswith(f"{path}/"), params)
    if not any(jax.tree.leaves(mask)):
        names = [_path_name(leaf) for leaf, _ in jax.tree_util.tree_leaves_with_path(params)]
        modules = dict.fromkeys(name.rpartition("/")[0] for name in names if "/" in name)
        raise ValueError(f"path={path!r} is no module of params; choose from {', '.join(modules)}.")
    return mask


def split_members(
    params: Any,
    mask: Mask | Callable[[Any], Mask],
    key: jax.Array,
    noise_scale: float = 0.0,
    *,
    num_members: int,
) -> SplitParams:
    """Make several members of some of the weights, in the middle of a training run.

    Args:
      params: ordinary parameters.
      mask: a tree like the parameters, or a function from the parameters to such a tree, such as `norm_mask`. `True`
        makes a weight a late-phase weight. `"rank-1"` leaves a matrix or a convolution kernel shared, and gives it
        late-phase factors that start at 1 (`RankOne`). `False` leaves a weight shared.
      key: a `jax.random` key, for the noise.
      noise_scale: standard deviation of the noise between members, relative to the root mean square of each tensor.
        The published experiments use none: the minibatches make the members differ.
      num_members: how many members to make.

    Returns:
      The split parameters.

    Raises:
      ValueError: if the mask selects nothing or everything, or is not like the parameters; if it has another value; if
        it asks for factors of a weight with unknown axes of inputs and outputs (the kernels of attention); or if a
        number is out of range.

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
        lambda param, choice: param if isinstance(choice, str) or not choice else optax.MaskedNode(), params, mask
    )
    if not jax.tree.leaves(late) or not jax.tree.leaves(base):
        raise ValueError(
            f"mask selects {'everything' if jax.tree.leaves(late) else 'nothing'}; select some of the weights, such as "
            "the weights of normalisation layers (norm_mask)."
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
    """Return the late-phase weights of a leaf of the parameters."""
    if not isinstance(choice, str):
        return param if choice else optax.MaskedNode()
    if choice != "rank-1":
        raise ValueError(f"mask is {choice!r} at {_path_name(path)}; choose from True, False and 'rank-1'.")
    if param.ndim < 2 or (param.ndim > 2 and role != "conv"):
        raise ValueError(
            f"mask is 'rank-1' at {_path_name(path)}, whose shape {param.shape} is not the shape of a matrix or of a "
            "convolution kernel, with one axis of inputs and one of outputs; choose True or False there."
        )
    return RankOne(*(jnp.ones(param.shape[axis], param.dtype) for axis in _factor_axes(path)))


def _factor_axes(path: Any) -> tuple[int, int]:
    """Return the axes of a kernel's inputs and outputs: first in Equinox (`weight`), last in Flax and Haiku."""
    return (1, 0) if _path_name(path[-1:]) == "weight" else (-2, -1)


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def select_member(split: SplitParams, member: Any) -> Any:
    """Return the ordinary parameters of one member.

    Args:
      split: from `split_members`.
      member: its index: an int, or a traced one, which is clipped to the range.

    Raises:
      ValueError: if `member` is an int out of range.
    """
    number = split.num_members
    if not isinstance(member, jax.Array):
        check_int("member", member, f"there are {number} members", minimum=0, maximum=number - 1)
    index = jnp.clip(jnp.asarray(member), 0, number - 1)
    return merge(split.base, jax.tree.map(lambda leaf: leaf[index], split.members))


def merge(base: Any, member: Any) -> Any:
    """Return the ordinary parameters made of the shared weights and the late-phase weights of one member."""

    def merge_leaf(path: Any, shared: Any, late: Any) -> Any:
        if isinstance(shared, optax.MaskedNode):
            return late
        if isinstance(late, optax.MaskedNode):
            return shared
        for factors, axis in zip(late, _factor_axes(path), strict=True):
            shared = shared * jnp.moveaxis(factors.reshape(-1, *[1] * (shared.ndim - 1)), 0, axis)
        return shared

    return jax.tree_util.tree_map_with_path(
        merge_leaf, base, member, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )


def split_gradient(gradient: Any, base: Any, member: Any) -> tuple[Any, Any]:
    """Return the gradients of the shared weights and of a member's late-phase weights, from the gradient of `merge`."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf, node: optax.tree.cast(node, leaf.dtype), gradient, tree)

    _, pullback = jax.vjp(merge, cast(base), cast(member))
    return pullback(gradient)


def average_members(split: SplitParams, batch_stats: Any = None, epsilon: float = 1e-5) -> tuple[Any, Any]:
    r"""Return one network that is the average of all members, for the end of a training run.

    With batch statistics for each member, the affine maps :math:`x \mapsto s_k x + t_k` of batch normalisation at test
    time are averaged, :math:`s_k = g_k / \sqrt{v_k + \epsilon}` and :math:`t_k = b_k - s_k m_k`. Averaging scale,
    shift, mean and variance one by one would give another map. All other weights are averaged directly, and factors of
    rank 1 before they multiply their kernel. A weight that is not finite in one member is not finite in the average.

    Args:
      split: the trained parameters.
      batch_stats: statistics of batch normalisation with a leading axis for the members, or `None` if there are none
        or the members share them. A module at the same path has a `scale` or a `bias` or both in the parameters, and a
        `mean` and a `var` in `batch_stats`.
      epsilon: the `epsilon` of the normalisation layers.

    Returns:
      Ordinary parameters, and `batch_stats` without the leading axis.

    Raises:
      ValueError: if `epsilon` is no float >= 0; if `batch_stats` has another number of members, or a module without
        `mean` and `var`.

    References:
      von Oswald et al., ICLR 2021
    """
    epsilon = check_float("epsilon", epsilon, "the epsilon of the normalisation layers", minimum=0)
    params = merge(split.base, jax.tree.map(_mean, split.members))
    if batch_stats is None:
        return params, None
    leaves = jax.tree_util.tree_leaves_with_path(batch_stats)
    for path, leaf in leaves:
        if leaf.shape[:1] != (split.num_members,):
            raise ValueError(
                f"batch_stats has the shape {leaf.shape} at {jax.tree_util.keystr(path)}; its first axis must be the "
                f"{split.num_members} members."
            )
    stats = {_names(path): leaf for path, leaf in leaves}
    modules = {names[:-1] for names in stats}
    for module in modules:
        if not {(*module, "mean"), (*module, "var")} <= set(stats):
            raise ValueError(f"batch_stats has no `mean` and `var` at {'/'.join(module)}.")
    members = jax.vmap(functools.partial(merge, split.base))(split.members)
    own = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(members)}

    def average_map(path: Any, param: jax.Array) -> jax.Array:
        *module, name = _names(path)
        if tuple(module) not in modules or name not in ("scale", "bias"):
            return param
        # In float32 or wider, for each member and for the average.
        pairs = [(leaf, _mean(leaf)) for leaf in (stats[(*module, moment)] for moment in ("mean", "var"))]
        (means, mean), (variances, variance) = jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), pairs)
        slopes = own.get((*module, "scale"), 1.0) / jnp.sqrt(variances + epsilon)
        deviation = jnp.sqrt(variance + epsilon)
        slope = _mean(slopes) if (*module, "scale") in own else 1 / deviation
        if name == "scale":
            return (slope * deviation).astype(param.dtype)
        return (_mean(own[(*module, "bias")] - slopes * means) + slope * mean).astype(param.dtype)

    return jax.tree_util.tree_map_with_path(average_map, params), jax.tree.map(_mean, batch_stats)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(_path_name((key,)) for key in path)


@jax.jit
def _mean(members: jax.Array) -> jax.Array:
    return mean_of(jnp.unstack(members)).astype(members.dtype)


def ensemble_predict(
    apply_fn: Callable[..., jax.Array], split: SplitParams, inputs: Any, batch_stats: Any = None
) -> jax.Array:
    """Return the mean of the predictions of all members.

    Args:
      apply_fn: `(params, inputs) -> predictions` of one member, such as probabilities. With `batch_stats`:
        `(params, inputs, batch_stats) -> predictions`.
      split: the parameters.
      inputs: the inputs of every member.
      batch_stats: statistics of batch normalisation with a leading axis for the members, or `None` if there are none
        or the members share them.
    """

    def predict(member: Any, *own_stats: Any) -> jax.Array:
        return apply_fn(merge(split.base, member), inputs, *own_stats)

    stats = () if batch_stats is None else (batch_stats,)
    return jax.vmap(predict)(split.members, *stats).mean(axis=0)
