from typing import Any

import equinox as eqx
import flax.core
import flax.linen as nn
import haiku as hk
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wnn_jax import default_roles
from wnn_jax._roles import ROLES, resolve_roles

CONV = {"kernel": "conv", "bias": "bias"}
DENSE = {"kernel": "dense", "bias": "bias"}
NORM = {"scale": "norm", "bias": "bias"}
ATTENTION = {"query": DENSE, "key": DENSE, "value": DENSE, "out": DENSE}


def roles_by_path(params: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): role
        for path, role in jax.tree_util.tree_leaves_with_path(default_roles(params))
    }


# The libraries' own initialisers make the trees, in part traced (`eval_shape`) because only the shapes count.


class LinenBlock(nn.Module):
    """One layer of a scanned stack: `nn.scan` gives every parameter a leading axis."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = nn.LayerNorm()(x)
        x = nn.Conv(8, [3])(x)
        x = nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(8, name="mix")(x), None


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(8, [3])(x)
        return nn.DenseGeneral(8, axis=(-2, -1), name="merge")(nn.DenseGeneral((2, 4), name="split")(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(11, 8)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 6, 8))
        x = nn.Conv(8, [3])(x)
        x = nn.Conv(8, [3, 3], feature_group_count=8, name="depthwise")(x)
        x = nn.ConvTranspose(8, [3])(x)
        for norm in (nn.BatchNorm(True), nn.LayerNorm(), nn.GroupNorm(2), nn.RMSNorm(), nn.LayerNorm(name="ln_f")):
            x = norm(x)
        x = LinenAttention(name="attention")(x)
        x = nn.DenseGeneral((2, 4))(x).reshape(1, 6, 8)
        x = nn.MultiHeadDotProductAttention(2)(x)
        x = nn.MultiHeadDotProductAttention(2, name="mha")(x)
        stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        return nn.Dense(2)(x)


LINEN_ROLES = {
    "Embed_0": {"embedding": "embedding"},
    "pos_embedding": "embedding",
    "Conv_0": CONV,
    "depthwise": CONV,
    "ConvTranspose_0": CONV,
    "BatchNorm_0": NORM,
    "LayerNorm_0": NORM,
    "GroupNorm_0": NORM,
    "RMSNorm_0": {"scale": "norm"},
    "ln_f": NORM,
    "attention": {"Conv_0": CONV, "split": DENSE, "merge": DENSE},
    "DenseGeneral_0": DENSE,
    "MultiHeadDotProductAttention_0": ATTENTION,
    "mha": ATTENTION,
    "stack": {
        "LayerNorm_0": NORM,
        "Conv_0": CONV,
        "MultiHeadDotProductAttention_0": ATTENTION,
        "mix": DENSE,
    },
    "OptimizedLSTMCell_0": {f"h{gate}": DENSE for gate in "ifgo"}
    | {f"i{gate}": {"kernel": "dense"} for gate in "ifgo"},
    "Dense_0": DENSE,
}


def test_linen_roles():
    params = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros([1, 6], int))["params"]
    assert default_roles(params) == LINEN_ROLES
    assert default_roles(flax.core.freeze(params)) == flax.core.freeze(LINEN_ROLES)


# Flax nnx


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.encode = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3,), feature_group_count=8, rngs=rngs)
        self.decode = nnx.ConvTranspose(8, 8, (3,), rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)])
        self.mix = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.adapted = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
        self.value = nnx.Sequential(nnx.Conv(8, 8, (3,), rngs=rngs), nnx.Linear(8, 2, rngs=rngs))

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 8, rngs=rngs)

        self.stacked = stack(rngs)


NNX_ROLES = {
    "tokens": {"embedding": "embedding"},
    "encode": CONV,
    "depthwise": CONV,
    "decode": CONV,
    "norms": {0: NORM, 1: NORM, 2: {"scale": "norm"}},
    "mix": ATTENTION,
    "split": DENSE,
    "adapted": DENSE,
    "value": {"layers": {0: CONV, 1: DENSE}},
    "stacked": DENSE,
}


def test_nnx_roles():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    del params["adapted"]["lora"]
    roles = default_roles(params)
    assert isinstance(roles, nnx.State)
    assert nnx.to_pure_dict(roles) == default_roles(nnx.to_pure_dict(params)) == NNX_ROLES
    adapters = default_roles(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    assert adapters == {"adapted": {"lora": {"lora_a": "dense", "lora_b": "dense"}}}


def test_nnx_roles_of_a_module_that_is_the_tree_itself():
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    assert set(roles_by_path(nnx.state(model, nnx.Param)).values()) == {"dense", "bias"}
    assert roles_by_path(nnx.LayerNorm(8, rngs=nnx.Rngs(0))) == {"scale/value": "norm", "bias/value": "bias"}


# Haiku


def haiku_model(tokens: jax.Array) -> jax.Array:
    x = hk.Embed(11, 8)(tokens)
    x = x + hk.get_parameter("pos_embeddings", [6, 8], init=jnp.zeros)[None]
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)
    x = hk.Conv1D(8, 3)(x)[:, None]
    x = hk.Conv2D(8, 3)(x)
    x = hk.DepthwiseConv2D(1, 3)(x)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
    x = hk.nets.MLP([4, 2])(x)
    core = hk.GRU(4)
    x, _ = core(x[:, 0, 0], core.initial_state(1))
    return hk.Linear(2)(x)


def test_haiku_roles():
    init = hk.transform_with_state(haiku_model).init
    params, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros([1, 6], int))
    conv = {"w": "conv", "b": "bias"}
    dense = {"w": "dense", "b": "bias"}
    norm = {"scale": "norm", "offset": "bias"}
    assert params["batch_norm"]["scale"].ndim == params["batch_norm"]["offset"].ndim == 4
    assert default_roles(params) == {
        "embed": {"embeddings": "embedding"},
        "~": {"pos_embeddings": "embedding"},
        "layer_norm": norm,
        **{f"multi_head_attention/{name}": dense for name in ("query", "key", "value", "linear")},
        "conv1_d": conv,
        "conv2_d": conv,
        "depthwise_conv2_d": conv,
        "batch_norm": norm,
        "mlp/~/linear_0": dense,
        "mlp/~/linear_1": dense,
        "gru": {"w_i": "dense", "w_h": "dense", "b": "bias"},
        "linear": dense,
    }


# Equinox


class EquinoxModel(eqx.Module):
    encode: eqx.nn.Conv2d
    layer_norm: eqx.nn.LayerNorm
    rms_norm: eqx.nn.RMSNorm
    norms: list[Any]
    tokens: eqx.nn.Embedding
    pos_embed: jax.Array
    mix: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell
    value: eqx.nn.Embedding
    stacked: eqx.nn.Linear
    mlp: eqx.nn.MLP
    activation: Any

    def __init__(self, key: jax.Array):
        keys = iter(jax.random.split(key, 8))
        self.encode = eqx.nn.Conv2d(2, 4, 3, key=next(keys))
        self.layer_norm = eqx.nn.LayerNorm((4, 2, 3))
        self.rms_norm = eqx.nn.RMSNorm((4, 2, 3), use_bias=False)
        self.norms = [eqx.nn.GroupNorm(2, 4), eqx.nn.BatchNorm(4, "batch", mode="batch")]
        self.tokens = eqx.nn.Embedding(11, 8, key=next(keys))
        self.pos_embed = jnp.zeros([1, 6, 8])
        self.mix = eqx.nn.MultiheadAttention(2, 8, use_output_bias=True, key=next(keys))
        self.cell = eqx.nn.GRUCell(8, 8, key=next(keys))
        self.value = eqx.nn.Embedding(11, 8, key=next(keys))
        make_layer = eqx.filter_vmap(lambda layer_key: eqx.nn.Linear(8, 8, key=layer_key))
        self.stacked = make_layer(jax.random.split(next(keys), 3))
        self.mlp = eqx.nn.MLP(8, 2, 8, 1, key=next(keys))
        self.activation = jax.nn.relu


def test_equinox_roles():
    model, _ = eqx.filter_eval_shape(eqx.nn.make_with_state(EquinoxModel), jax.random.key(0))
    model = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, model)
    params = eqx.filter(model, eqx.is_inexact_array)
    assert params.encode.bias.ndim == params.layer_norm.weight.ndim == 3
    layer = {"weight": "dense", "bias": "bias"}
    norm = {"weight": "norm", "bias": "bias"}
    modules = {
        "encode": {"weight": "conv", "bias": "bias"},
        **dict.fromkeys(("layer_norm", "norms/0", "norms/1"), norm),
        "rms_norm": {"weight": "norm"},
        **{name: {"weight": "embedding"} for name in ("tokens", "value")},
        **{f"mix/{name}_proj": {"weight": "dense"} for name in ("query", "key", "value")},
        **dict.fromkeys(("mix/output_proj", "stacked", "mlp/layers/0", "mlp/layers/1"), layer),
        "cell": {"weight_ih": "dense", "weight_hh": "dense", "bias": "bias", "bias_n": "bias"},
    }
    expected = {f"{module}/{name}": role for module, roles in modules.items() for name, role in roles.items()}
    assert roles_by_path(params) == {**expected, "pos_embed": "embedding"}
    one = eqx.filter(eqx.nn.LayerNorm((4, 2, 3)), eqx.is_inexact_array)
    assert roles_by_path(one) == norm


# Trees of other makes


@pytest.mark.parametrize(
    ("path", "shape", "role"),
    [
        ("ln_1/weight", (8,), "norm"),
        ("bn1/weight", (8,), "norm"),
        ("norm/gamma", (8,), "norm"),
        ("norm/beta", (8,), "bias"),
        ("bneck/weight", (8, 8, 3, 3), "conv"),
        ("norm_proj/weight", (8, 8), "dense"),
        ("ln_proj/kernel", (8, 8), "dense"),
        ("dense_block/layer_0/kernel", (3, 3, 8, 8), "conv"),
        ("attention/relative_bias", (2, 6, 6), "bias"),
        ("embedding/kernel", (16, 16, 3, 8), "conv"),
        ("wte/weight", (11, 8), "embedding"),
        ("pos_emb", (1, 6, 8), "embedding"),
        ("experts/w_in", (4, 8, 8), "dense"),
    ],
)
def test_names_of_other_codebases(path: str, shape: tuple[int, ...], role: str):
    tree: Any = np.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(default_roles(tree)) == [role]


shapes = st.lists(st.integers(0, 3), max_size=5).map(tuple)
arrays = shapes.map(np.zeros)
meaningful_names = st.sampled_from(
    ["kernel", "weight", "bias", "b", "scale", "embedding", "Conv_0", "LayerNorm_0", "query", "key", "value", "out"]
)


def trees_of(leaves: st.SearchStrategy[Any], names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda children: st.one_of(
            st.lists(children, max_size=3),
            st.tuples(children, children),
            st.dictionaries(names, children, max_size=4),
        ),
        max_leaves=12,
    )


@hypothesis.given(trees_of(st.one_of(arrays, st.none()), st.one_of(meaningful_names, st.text(max_size=5))))
def test_every_tree_has_roles(params: Any):
    roles = default_roles(params)
    assert jax.tree.structure(roles) == jax.tree.structure(params)
    assert set(jax.tree.leaves(roles)) <= set(ROLES)


@hypothesis.given(trees_of(arrays, st.text("xyz_0", max_size=5)))
def test_among_unknown_names_the_rank_decides(params: Any):
    by_rank = ("bias", "bias", "dense", "conv")
    assert default_roles(params) == jax.tree.map(lambda leaf: by_rank[min(leaf.ndim, 3)], params)


# Roles that the user gives

PARAMS = {"a": np.zeros((3, 3)), "b": {"c": np.zeros(3)}}


def test_roles_may_be_a_tree_or_a_function_or_left_out():
    tree = {"a": "conv", "b": {"c": "norm"}}
    assert resolve_roles(tree, PARAMS) == tree
    assert resolve_roles(lambda params: jax.tree.map(lambda _: "embedding", params), PARAMS) == {
        "a": "embedding",
        "b": {"c": "embedding"},
    }
    assert resolve_roles(None, PARAMS) == default_roles(PARAMS)
    assert resolve_roles("conv", np.zeros(3)) == "conv"
    assert resolve_roles(lambda _: "norm", np.zeros(3)) == "norm"
    assert resolve_roles({"a": "dense"}, {}) == {}


def test_roles_may_be_a_callable_model():
    model = eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    roles = default_roles(model)
    assert callable(roles)
    assert resolve_roles(roles, model) is roles


@pytest.mark.parametrize(
    "roles",
    [
        {"a": "dense"},
        {"a": "dense", "b": "bias"},
        {"a": "dense", "b": {"c": None}},
        ["dense", "bias"],
        "dense",
        lambda params: params["b"],
        eqx.nn.Identity(),
    ],
)
def test_roles_of_another_structure_are_refused(roles: Any):
    with pytest.raises(ValueError, match="roles does not match params"):
        resolve_roles(roles, PARAMS)


@pytest.mark.parametrize("role", ["Dense", "", 0, True, np.zeros(3)])
def test_unknown_roles_are_refused(role: Any):
    with pytest.raises(ValueError, match=r"roles has the unknown role .* at \['b'\]\['c'\]; choose from conv, dense"):
        resolve_roles({"a": "dense", "b": {"c": role}}, PARAMS)


@pytest.mark.parametrize("names", [("A", "B"), ("a", "b"), ("lora_a", "b")])
def test_a_matrix_called_b_is_no_bias(names: tuple[str, str]):
    adapter = dict(zip(names, (np.zeros((64, 4)), np.zeros((4, 32))), strict=True))
    assert roles_by_path({"query": adapter}) == {f"query/{name}": "dense" for name in names}


def test_a_bias_of_stacked_layers_is_one():
    layer = {"w": np.zeros((12, 64, 32)), "b": np.zeros((12, 32))}
    assert roles_by_path({"linear": layer}) == {"linear/w": "dense", "linear/b": "bias"}
