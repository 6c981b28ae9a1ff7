"""Which kind of operation a parameter belongs to, read from its name and rank."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

ROLES = ("conv", "dense", "bias", "norm", "embedding")

RolesLike = Any | Callable[[Any], Any] | None

# Names as the four JAX network libraries give them: Flax linen and nnx (kernel, bias, scale, embedding),
# Haiku (w, b, scale, offset, embeddings), Equinox (weight, bias).
_BIAS = re.compile(r"(b|beta|offset|shift)|(.*_)?bias(_.*)?")
_NORM_SCALE = re.compile(r"scale|gamma")
_EMBEDDING = re.compile(r".*emb(ed(ding)?)?s?|wte|wpe")
# A module's name (`LayerNorm_0`, `bn1`, `ln_f`) or, for Equinox, its class.
_NORM_MODULE = re.compile(r".*norm(_?\d+)?|(bn|ln)\d*(_\w+)?")
# Modules whose parameters of rank 3 and more are matrices with split or stacked axes, not windows: those that own
# the parameter, and those that may have it further down.
_DENSE_MODULE = re.compile(r".*(dense|linear|einsum).*|query|key|value|qkv")
_DENSE_ANCESTOR = re.compile(r".*(att(entio)?n|expert).*")
# The children by which an attention module is known, whatever its own name.
_ATTENTION_CHILDREN = frozenset({"query", "key", "value"})

_Names = tuple[str, ...]


def default_roles(params: Any) -> Any:
    """Names the role of every parameter, from its path and rank.

    The roles are those of the weight nowcaster network (Jang et al., ICML 2023: one network per kind of
    operation), with two more for what its published code skips:

    - `"bias"`: anything called a bias (also the shift of a norm layer; a matrix called `b` is none), and any other
      leaf of rank <= 1;
    - `"norm"`: the scale of a norm layer;
    - `"embedding"`: a table of token or position embeddings;
    - `"dense"`: a leaf of rank 2, and one of higher rank that is a matrix with split or stacked axes: one in an
      attention or dense module (Flax's attention kernels are `[d_model, heads, head_dim]`), or whose bias has
      split or stacked axes too (a scanned layer's kernel is `[layers, in, out]`, its bias `[layers, out]`);
    - `"conv"`: any other leaf of rank >= 3.

    Names are understood as Flax linen, Flax nnx, Haiku and Equinox give them. In trees of other makes the
    rank decides.

    Args:
      params: a tree of arrays (or of anything with `shape`).

    Returns:
      A tree of the same structure with a role name at each leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import wnn_jax
      >>> wnn_jax.default_roles({"Conv_0": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)}})
      {'Conv_0': {'bias': 'bias', 'kernel': 'conv'}}
    """
    leaves = _named_shapes(params)
    children: dict[_Names, set[str]] = {}
    for names, _ in leaves:
        for depth, name in enumerate(names):
            children.setdefault(names[:depth], set()).add(name)

    roles: list[str] = []
    is_bias = _are_biases(leaves)
    for (names, shape), bias, is_leaf_bias in zip(leaves, bias_shapes(params), is_bias, strict=True):
        if is_leaf_bias:
            roles.append("bias")
            continue
        # A bias has one axis of its own; any others are stacked layers or split features, as in its kernel.
        bias_axes = sum(size > 1 for size in bias or ())
        in_attention = children.get(names[:-2], set()) >= _ATTENTION_CHILDREN
        roles.append(_role(names, len(shape), num_split=max(bias_axes - 1, 0), in_attention=in_attention))
    return jax.tree.unflatten(jax.tree.structure(params), roles)


def bias_shapes(params: Any) -> list[tuple[int, ...] | None]:
    """For each leaf, the shape of the bias in the same module, or `None` where there is none."""
    leaves = _named_shapes(params)
    named = zip(leaves, _are_biases(leaves), strict=True)
    biases = {names[:-1]: shape for (names, shape), is_bias in named if is_bias and names[-1] in ("bias", "b")}
    return [biases.get(names[:-1]) for names, _ in leaves]


def _are_biases(leaves: Sequence[tuple[_Names, tuple[int, ...]]]) -> list[bool]:
    """Which leaves are biases, by their names.

    A matrix `b`, as of a low-rank adapter, is none. That of stacked layers, or with split features, has a kernel with
    an axis more beside it.
    """
    ranks: dict[_Names, int] = {}
    for names, shape in leaves:
        ranks[names[:-1]] = max(len(shape), ranks.get(names[:-1], 0))
    return [
        bool(names and _BIAS.fullmatch(names[-1]))
        and (names[-1] != "b" or len(shape) <= 1 or len(shape) < ranks[names[:-1]])
        for names, shape in leaves
    ]


def resolve_roles(roles: RolesLike, params: Any) -> Any:
    """The tree of roles for `params`, checked.

    Args:
      roles: a tree of role names like `params`, a function from params to such a tree, or `None` for
        `default_roles`.
      params: the parameters.

    Raises:
      ValueError: if the tree does not match `params`, or has an unknown role in it.
    """
    structure = jax.tree.structure(params)
    if structure.num_leaves == 0:  # `optax.tree.map_params` calls `init` on an empty stand-in for the params.
        return params
    if roles is None:
        tree = default_roles(params)
    else:
        # A tree can be callable too (an Equinox model's is), but only a function is a leaf.
        is_function = callable(roles) and jax.tree_util.all_leaves([roles])
        tree = roles(params) if is_function else roles
    if jax.tree.structure(tree) != structure:
        raise ValueError(
            f"roles does not match params: it has the structure {jax.tree.structure(tree)} but the params have "
            f"{structure}. Pass a tree with one role name per parameter, or a function params -> tree (the right "
            "choice under optax.masked and optax.partition, where this transformation sees a part of the params)."
        )
    for path, role in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"roles has the unknown role {role!r} at {jax.tree_util.keystr(path)}; choose from {', '.join(ROLES)}."
            )
    return tree


def _named_shapes(params: Any) -> list[tuple[_Names, tuple[int, ...]]]:
    return [
        (names_along(params, path), tuple[int, ...](getattr(leaf, "shape", ())))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def names_along(root: Any, path: tuple[Any, ...], *, with_classes: bool = True) -> _Names:
    """The names along a path, outermost first, in lower case.

    Equinox keeps its modules in the parameter tree and names every operation `weight`: the class of each
    module passed is therefore one more name, put before the leaf's own, unless `with_classes` is `False`.
    """
    names: list[str] = []
    node: Any = root
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if hasattr(node, "get_raw_value"):  # An `nnx.Variable` puts what it holds one key deeper, under no name.
                node = node.get_raw_value()
            else:
                names += [type(node).__name__, key.name] if with_classes else [key.name]
                node = getattr(node, key.name, None)
        elif isinstance(key, jax.tree_util.SequenceKey):
            names.append(str(key.idx))
            node = node[key.idx] if isinstance(node, (list, tuple)) else None
        else:
            name = getattr(key, "key", key)
            names += str(name).split("/")  # Haiku joins module names with slashes.
            node = node[name] if isinstance(node, Mapping) and name in node else None
    return tuple(name.lower() for name in names)


def _role(names: _Names, rank: int, *, num_split: int, in_attention: bool) -> str:
    *ancestors, module, leaf = ("", "", *names)
    if _NORM_SCALE.fullmatch(leaf) or (leaf == "weight" and _NORM_MODULE.fullmatch(module)):
        return "norm"
    if _EMBEDDING.fullmatch(leaf) or (leaf == "weight" and _EMBEDDING.fullmatch(module)):
        return "embedding"
    if rank <= 1:
        return "bias"
    if rank == 2:
        return "dense"
    if "conv" in module:
        return "conv"
    in_dense = (
        in_attention or _DENSE_MODULE.fullmatch(module) or any(map(_DENSE_ANCESTOR.fullmatch, (*ancestors, module)))
    )
    return "dense" if in_dense or rank - num_split == 2 else "conv"
