"""Which kind of operation a parameter belongs to, read from its name and rank."""

import re
from collections.abc import Callable, Mapping
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
# Modules whose parameters of rank 3 and more are matrices with split or stacked axes: the modules that own such a
# parameter, and modules that may have it further down.
_DENSE_MODULE = re.compile(r".*(dense|linear|einsum).*|query|key|value|qkv")
_DENSE_ANCESTOR = re.compile(r".*(att(entio)?n|expert).*")
# An attention module has these children, whatever its own name is.
_ATTENTION_CHILDREN = frozenset({"query", "key", "value"})

_Names = tuple[str, ...]


def default_roles(params: Any) -> Any:
    """Name the role of every parameter, from its path and rank.

    Three are from the weight nowcaster network (Jang et al., ICML 2023). Its code skips `"norm"` and `"embedding"`.

    - `"bias"`: anything called a bias, the shift of a norm layer, and any other leaf of rank 1 or 0. A matrix called
      `b` is no bias;
    - `"norm"`: the scale of a norm layer;
    - `"embedding"`: a table of token or position embeddings;
    - `"dense"`: a leaf of rank 2, and a matrix with split or stacked axes. A leaf of higher rank is such a matrix if it
      belongs to an attention or dense module (Flax's attention kernels are `[d_model, heads, head_dim]`), or if its
      bias has such axes too (a scanned layer's kernel is `[layers, in, out]`, its bias `[layers, out]`);
    - `"conv"`: any other leaf of rank 3 or more.

    Names are understood as Flax linen, Flax nnx, Haiku and Equinox give them. In other trees the rank decides.

    Args:
      params: a tree of arrays, or of anything with a `shape`.

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
    for names, _, _ in leaves:
        for depth, name in enumerate(names):
            children.setdefault(names[:depth], set()).add(name)

    def role_of(names: _Names, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> str:
        # A bias has one axis. More axes are stacked layers or split features, and its kernel has them too.
        num_split = max(sum(size > 1 for size in bias or ()) - 1, 0)
        return _role(names, len(shape) - num_split, len(shape), children.get(names[:-2], set()) >= _ATTENTION_CHILDREN)

    roles = [
        "bias" if is_bias else role_of(names, shape, bias)
        for (names, shape, is_bias), bias in zip(leaves, bias_shapes(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), roles)


def _role(names: _Names, rank: int, num_axes: int, in_attention: bool) -> str:
    *ancestors, module, leaf = ("", "", *names)
    if _NORM_SCALE.fullmatch(leaf) or (leaf == "weight" and _NORM_MODULE.fullmatch(module)):
        return "norm"
    if _EMBEDDING.fullmatch(leaf) or (leaf == "weight" and _EMBEDDING.fullmatch(module)):
        return "embedding"
    if num_axes <= 2:
        return "dense" if num_axes == 2 else "bias"
    if "conv" in module:
        return "conv"
    in_dense = _DENSE_MODULE.fullmatch(module) or any(map(_DENSE_ANCESTOR.fullmatch, (*ancestors, module)))
    return "dense" if in_attention or in_dense or rank == 2 else "conv"


def bias_shapes(params: Any) -> list[tuple[int, ...] | None]:
    """Return for each leaf the shape of the bias in the same module, or `None` if there is no bias."""
    leaves = _named_shapes(params)
    biases = {names[:-1]: shape for names, shape, is_bias in leaves if is_bias and names[-1] in ("bias", "b")}
    return [biases.get(names[:-1]) for names, _, _ in leaves]


def _named_shapes(params: Any) -> list[tuple[_Names, tuple[int, ...], bool]]:
    """Return the names along the path of each leaf, its shape, and whether it is called a bias."""
    leaves = [
        (names_along(params, path), tuple[int, ...](getattr(leaf, "shape", ())))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    ranks: dict[_Names, int] = {}
    for names, shape in leaves:
        ranks[names[:-1]] = max(len(shape), ranks.get(names[:-1], 0))

    def is_bias(names: _Names, rank: int) -> bool:
        # A matrix `b`, as in a low-rank adapter, is no bias, unless its module has a kernel with one more axis.
        may_be_b = rank <= 1 or rank < ranks[names[:-1]]
        return bool(names and _BIAS.fullmatch(names[-1]) and (names[-1] != "b" or may_be_b))

    return [(names, shape, is_bias(names, len(shape))) for names, shape in leaves]


def resolve_roles(roles: RolesLike, params: Any) -> Any:
    """Return a checked tree of roles for `params`: the tree given, the one a function makes, or `default_roles`."""
    structure = jax.tree.structure(params)
    if structure.num_leaves == 0:  # `optax.tree.map_params` calls `init` on an empty stand-in for the params.
        return params
    # A tree can be callable too (an Equinox model's is), but only a function is a leaf.
    is_function = callable(roles) and jax.tree_util.all_leaves([roles])
    tree = default_roles(params) if roles is None else roles(params) if is_function else roles
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


def names_along(root: Any, path: tuple[Any, ...], *, with_classes: bool = True) -> _Names:
    """Return the names along a path, outermost first, in lower case.

    Equinox names every operation `weight`, and keeps its modules in the parameter tree. So the class of each module on
    the path is one more name, before the name of the attribute, unless `with_classes` is `False`.
    """
    names: list[str] = []
    node: Any = root
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if hasattr(node, "get_raw_value"):  # An `nnx.Variable` holds its value one key deeper, under no name.
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
