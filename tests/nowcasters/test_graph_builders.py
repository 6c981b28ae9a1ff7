"""Which models are known, and what their description is."""

import itertools
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnn_jax
from tests.nowcasters.graphs import (
    CONVOLUTIONS,
    MODELS,
    TOKENS,
    block,
    graph_of,
    init,
    kernel,
    model_of,
    norm,
    transformer,
)
from wnn_jax.lab.tasks.models import LSTM
from wnn_jax.nowcasters import neural_graph
from wnn_jax.nowcasters.nino.nowcaster import tensors_of


@pytest.fixture(scope="module", params=MODELS)
def params(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


# Models that are known


def test_a_chain():
    edges = neural_graph(model_of("cnn-8-16-32"))["edges"]
    assert {path: names for path, names in edges.items() if path.endswith("kernel")} == {
        "Conv_0/kernel": ["input", "conv_0"],
        "Conv_1/kernel": ["conv_0", "conv_1"],
        "Conv_2/kernel": ["conv_1", "conv_2"],
        "Dense_0/kernel": ["conv_2", "dense_0"],
        "Dense_1/kernel": ["dense_0", "dense_1"],
    }
    assert edges["Dense_0/bias"] == ["dense_0"]
    assert neural_graph({"params": {"net": {"fc": kernel(3, 4)}}})["edges"] == {
        "params/net/fc/kernel": ["input", "params/net/fc"]
    }
    assert neural_graph(jnp.zeros((3, 4)))["edges"] == {"": ["input", "model"]}
    assert neural_graph({})["edges"] == {}


def test_dense_layers_whose_numbers_go_backwards():
    edges = neural_graph(model_of("vgg"))["edges"]
    assert edges["Dense_1/kernel"] == ["convnorm_3/conv_0", "dense_1"]
    assert edges["Dense_0/kernel"] == ["dense_1", "dense_0"]
    assert edges["ConvNorm_2/BatchNorm_0/scale"] == ["convnorm_2/conv_0"]


def test_residual_blocks():
    description = neural_graph(MODELS["resnet"]())
    edges = description["edges"]
    assert description["residual"] == [["conv_init", "resnetblock_0/conv_1"]]
    assert edges["ResNetBlock_1/conv_proj/kernel"] == ["resnetblock_0/conv_1", "resnetblock_1/conv_1"]
    assert edges["ResNetBlock_1/norm_proj/scale"] == ["resnetblock_1/conv_1"]
    assert edges["ResNetBlock_1/BatchNorm_0/scale"] == ["resnetblock_1/conv_0"]
    assert edges["bn_init/scale"] == ["conv_init"]
    assert edges["Dense_0/kernel"] == ["resnetblock_1/conv_1", "dense_0"]


@pytest.mark.parametrize("name", ["transformer", "transformer-2x24"])
def test_a_transformer(name: str):
    description = neural_graph(MODELS[name]())
    edges, kinds = description["edges"], description["kinds"]
    prefix = "TransformerBlock_1/attn" if name == "transformer" else "MultiHeadDotProductAttention_1"
    before = edges[f"{prefix}/query/kernel"][0]
    queries, values = f"{prefix.lower()} queries", f"{prefix.lower()} values"
    assert edges[f"{prefix}/query/kernel"] == [before, queries]
    assert edges[f"{prefix}/key/kernel"] == [queries, before]
    assert edges[f"{prefix}/value/kernel"] == [before, values]
    assert edges[f"{prefix}/out/kernel"] == [values, prefix.lower()]
    assert {kinds[f"{prefix}/{part}/kernel"] for part in ("query", "key", "value")} == {"query", "key", "value"}
    assert kinds["wpe/embedding"] == "position"
    assert edges["wpe/embedding"][1] == edges["wte/embedding"][1] == "wte"
    heads = 2 if name == "transformer" else 4
    assert description["heads"][queries] == description["heads"][values] == heads
    # Around attention and around the dense layers of each block.
    assert len(description["residual"]) == 4
    assert all(one[1] == other[0] for one, other in itertools.pairwise(description["residual"]))
    norms = ("TransformerBlock_1/ln_1", "TransformerBlock_1/ln_2", "ln_f")
    if name == "transformer-2x24":
        norms = ("LayerNorm_2", "LayerNorm_3", "LayerNorm_4")
    places = [[before], [prefix.lower()], [description["residual"][-1][1]]]
    assert [edges[f"{norm}/scale"] for norm in norms] == places


@pytest.mark.parametrize(
    "inside",
    [("self_attention_norm", "feed_forward_norm"), ("input_layernorm", "post_attention_layernorm"), ("norm1", "norm2")],
)
def test_norms_of_a_transformer_are_where_their_names_say(inside: tuple[str, ...]):
    edges = neural_graph(transformer("final_norm", inside=inside, number=1))["edges"]
    places = [edges[f"TransformerBlock_0/{name}/scale"] for name in inside]
    assert places == [["wte"], ["transformerblock_0/attn"]]
    assert edges["final_norm/scale"] == ["transformerblock_0/ffn/c_proj"]


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(96, 5, rngs=rngs), nnx.Linear(5, 10, rngs=rngs)


class NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (nnx.LayerNorm(8, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(8, 7, rngs=rngs)


class EquinoxModel(eqx.Module):
    conv: eqx.nn.Conv2d
    layers: list[eqx.nn.Linear]

    def __init__(self, key: jax.Array):
        self.conv = eqx.nn.Conv2d(3, 6, 3, key=key)
        self.layers = [eqx.nn.Linear(*size, key=key) for size in ((96, 5), (5, 10))]


class EquinoxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    linears: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key: jax.Array):
        self.embed = eqx.nn.Embedding(7, 8, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=key)
        self.linears = [eqx.nn.Linear(*size, key=key) for size in ((8, 16), (16, 8), (8, 7))]
        self.norms = [eqx.nn.LayerNorm(8) for _ in range(3)]


def of_framework(model: Any) -> Any:
    if model in (NnxModel, NnxTransformer):
        return nnx.state(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param)
    return jax.eval_shape(lambda: eqx.filter(model(jax.random.key(0)), eqx.is_inexact_array))


@pytest.mark.parametrize("model", [NnxModel, EquinoxModel])
def test_chains_of_other_frameworks(model: Any):
    """Rows of the same channel belong to one neuron: every sixth row in Flax, 16 successive rows in Equinox."""
    params = of_framework(model)
    matrices = {path: names for path, names in neural_graph(params)["edges"].items() if len(names) == 2}
    assert [names[0] for names in matrices.values()][1:] == [names[1] for names in matrices.values()][:-1]
    assert len(matrices) == 3
    graph = graph_of(params)
    first = next(path for path in matrices if "linear1" in path or "layers/0" in path)
    index = [tensor.path for tensor in tensors_of(params, wnn_jax.default_roles(params))[0]].index(first)
    ends = graph.blocks[index].ends
    sources, targets = ends.at(np.arange(96 * 5), np)
    expected = np.arange(96) % 6 if model is NnxModel else np.arange(96) // 16
    np.testing.assert_array_equal(sources.reshape(96, 5)[:, 0] - ends.first_row, expected)
    np.testing.assert_array_equal(targets.reshape(96, 5)[0] - ends.first_column, np.arange(5))


@pytest.mark.parametrize("model", [NnxTransformer, EquinoxTransformer])
def test_transformers_of_other_frameworks(model: Any):
    params = of_framework(model)
    if model is EquinoxTransformer:
        with pytest.raises(ValueError, match=r"'attention/query_proj/weight'.*how many heads.*num_heads="):
            neural_graph(params)
        with pytest.raises(ValueError, match="its 8 outputs are not those of num_heads=3 heads"):
            neural_graph(params, num_heads=3)
    description = neural_graph(params, num_heads=2)
    edges = {tuple(names) for names in description["edges"].values()}
    queries, values = "attention queries", "attention values"
    assert {("embed", queries), (queries, "embed"), ("embed", values), (values, "attention")} <= edges
    assert description["heads"][queries] == 2
    assert len(description["residual"]) == 2
    assert np.isfinite(graph_of(params, description).positions).all()


@pytest.mark.parametrize("heads", [(), (2,)])
def test_queries_keys_and_values_in_one_leaf(heads: tuple[int, ...]):
    """The graph is that of three leaves."""
    separate, joined = transformer(number=1), transformer(number=1)
    shapes = ((8, 3, *heads, 4), (3, *heads, 4)) if heads else ((8, 24), (24,))
    fused = dict(zip(("kernel", "bias"), map(jnp.zeros, shapes), strict=True))
    joined["TransformerBlock_0"]["attn"] = {"c_attn": fused, "c_proj": kernel(8, 8)}
    if not heads:
        with pytest.raises(ValueError, match=r"'TransformerBlock_0/attn/c_attn/kernel:query'.*how many heads"):
            neural_graph(joined)
    description, expected = neural_graph(joined, num_heads=2), neural_graph(separate)
    names = {"TransformerBlock_0/attn/out/kernel": "TransformerBlock_0/attn/c_proj/kernel"}
    for part, leaf in itertools.product(("query", "key", "value"), ("kernel", "bias")):
        names[f"TransformerBlock_0/attn/{part}/{leaf}"] = f"TransformerBlock_0/attn/c_attn/{leaf}:{part}"
    for what in ("edges", "kinds"):
        assert description[what] == {names.get(path, path): value for path, value in expected[what].items()}
    assert [description[what] for what in ("heads", "residual")] == [expected[what] for what in ("heads", "residual")]
    assert sorted(graph_of(joined, description).degrees) == sorted(graph_of(separate, expected).degrees)


def test_a_description_is_json(params: Any):
    description = neural_graph(params)
    assert json.loads(json.dumps(description)) == description


# Models that are refused

RESIDUAL = {"conv_init": kernel(3, 3, 3, 8), "head": kernel(8, 2)}


def without(tree: Any, *path: str) -> Any:
    first, *rest = path
    return {
        name: without(node, *rest) if name == first else node for name, node in tree.items() if rest or name != first
    }


@pytest.mark.parametrize(
    ("make", "leaf", "reason"),
    [
        (lambda: model_of("resnet"), "Conv_5/kernel", "its inputs are not the outputs of the layer before it"),
        (lambda: init(LSTM(5), TOKENS), "OptimizedLSTMCell_0/", "no builder knows the name 'optimizedlstmcell_0'"),
        (lambda: {**CONVOLUTIONS, "SE_0": {"a": kernel(8, 2)}}, "SE_0/a/", "no builder knows the name 'se_0'"),
        (lambda: {**CONVOLUTIONS, "PReLU_0": {"negative_slope": jnp.zeros([])}}, "PReLU_0/", "no builder knows"),
        (lambda: {"fc1": kernel(4, 4), "linear2": kernel(4, 4)}, "fc1/", "could come before 'linear2'"),
        (lambda: {"Dense_0": kernel(8, 4), "Dense_1": kernel(4, 8)}, "Dense_0/", "could come before 'dense_1'"),
        (lambda: {"Dense_0": kernel(8, 4), "Dense_1": kernel(5, 7)}, "Dense_1/", "its inputs are not the outputs"),
        (lambda: {"layers": [kernel(3, 8), kernel(3, 3, 3, 8)]}, "layers/1/", "a dense layer comes before it"),
        (lambda: {"fc": {"a": kernel(4, 4), "b": kernel(4, 4)}}, "fc/a/", "has 2 layers, which may be connected"),
        (lambda: {"fc": {"kernel": jnp.zeros((4, 4)), "u": jnp.zeros((4, 4))}}, "fc/u", "no builder knows what it is"),
        (lambda: {"fc": kernel(4, 4), "cls": jnp.zeros([1, 8])}, "cls", "no builder knows what it is for"),
        (lambda: {"fc": kernel(0, 4)}, "fc/", "it is empty"),
        (lambda: {"Conv_0": kernel(3, 3, 48, 3), "Dense_0": kernel(48, 768)}, "Dense_0/", "an image of its outputs"),
        (lambda: {"Dense_0": kernel(3, 3), "Conv_0": kernel(3, 3, 3, 1)}, "Dense_0/", "an image of its outputs"),
        (lambda: {**CONVOLUTIONS, "norm": norm()}, "norm/scale", "there are 2 layers of its size, and 1 such norms"),
        (lambda: {**CONVOLUTIONS, "bn_1": norm(), "norm": norm()}, "norm/", "could come before 'bn_1'"),
        (lambda: {"convnorm": {"conv": kernel(3, 3, 3, 8), "norm": norm(3)}}, "convnorm/norm/", "it has 3 elements"),
        (lambda: {**RESIDUAL, "ResBlock_0": {"conv": kernel(3, 3, 8, 6)}}, "ResBlock_0/", "no projection from its"),
        (lambda: {"ResBlock_0": {"conv": kernel(3, 3, 8, 8)}}, "ResBlock_0/", "has no layer before it"),
        (lambda: transformer(inside=("ln_1", "ln_2")), "TransformerBlock_0/", "and 2 normalisation layers, where"),
        (lambda: transformer("ln_f"), "TransformerBlock_0/", "and 0 normalisation layers, where .* 1, 2 and 2"),
        (lambda: transformer("embed_ln"), "embed_ln/", "no builder knows the name 'embed_ln'"),
        (lambda: transformer("ln_f", inside=("ln", "norm")), "TransformerBlock_0/", "could come before"),
        (lambda: without(transformer(conv=kernel(3, 8, 8)), "lm_head"), "conv/", "ends in one normalisation layer"),
        (lambda: transformer(head=kernel(8, 3)), "lm_head/", "ends in one normalisation layer and one dense layer"),
        (lambda: transformer(wpe={"embedding": jnp.zeros((9, 4))}), "wpe/", "begins with a table of tokens"),
        (lambda: transformer(TransformerBlock_0=block({"a": kernel(8, 32)})), "TransformerBlock_0/", "1 dense and"),
        (
            lambda: transformer(TransformerBlock_0=block({"a": kernel(8, 8), "b": kernel(8, 8)})),
            "TransformerBlock_0/ffn/a",
            "could come before 'transformerblock_0/ffn/b'",
        ),
        (
            lambda: transformer(TransformerBlock_0=block({"a": kernel(8, 32), "b": kernel(32, 4)})),
            "TransformerBlock_0/ffn/b",
            "it has 4 outputs where the blocks have 8 features",
        ),
        (
            lambda: without(transformer(), "TransformerBlock_0", "attn", "out"),
            "TransformerBlock_0/attn/",
            "its attention has no projection back",
        ),
        (
            lambda: transformer(TransformerBlock_0={**block(), "attn": {**block()["attn"], "key": kernel(8, 3, 4)}}),
            "TransformerBlock_0/attn/key/",
            "it is 8 x 12 where its attention has 8 x 8",
        ),
    ],
)
def test_what_no_builder_knows_is_refused_by_a_leaf(make: Any, leaf: str, reason: str):
    with pytest.raises(ValueError, match=rf"the leaf '{leaf}.*({reason}).*NiNo\(graph="):
        neural_graph(make())


@pytest.mark.parametrize("role", ["dense", "conv", "embedding"])
def test_a_role_that_has_more_axes(role: str):
    with pytest.raises(ValueError, match=rf"no edges for the leaf 'w' of shape \(5,\) as '{role}'.*'bias' or 'norm'"):
        neural_graph({"w": jnp.zeros(5)}, {"w": role})
