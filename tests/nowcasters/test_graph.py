"""The neural graph of a model: which models are known, and what follows from a description."""

import itertools
import json
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnn_jax
from wnn_jax.lab.tasks.models import ARCHITECTURES, LSTM, MLP, train_option
from wnn_jax.nowcasters import neural_graph
from wnn_jax.nowcasters.nino._description import build_graph
from wnn_jax.nowcasters.nino._graph import KINDS, Graph, Tensor
from wnn_jax.nowcasters.nino.nowcaster import tensors_of

IMAGES = jnp.zeros((1, 16, 16, 3))
TOKENS = jnp.zeros((1, 8), jnp.int32)


def init(model: nn.Module, *inputs: Any) -> Any:
    options = train_option(model, train=True)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))["params"]


def model_of(name: str) -> Any:
    return init(ARCHITECTURES[name](10), TOKENS if "transformer" in name else IMAGES)


def graph_of(params: Any, description: Any = None) -> Graph:
    description = neural_graph(params) if description is None else description
    return build_graph(description, tensors_of(params, wnn_jax.default_roles(params))[0])


def edges_of(graph: Graph, params: Any) -> list[tuple[int, int, int]]:
    """Source, target and kind of every edge, sorted."""
    edges = list(zip(graph.sources.tolist(), graph.targets.tolist(), graph.kinds.tolist(), strict=True))
    assert len(graph.blocks) == len(jax.tree.leaves(params))
    for block in graph.blocks:
        _, rows, columns = block.piece.tensor.sizes
        ends = block.ends.at(np.arange(rows * columns), np)
        edges += [(int(source), int(target), block.kind) for source, target in zip(*ends, strict=True)]
    return sorted(edges)


def kernel(*shape: int) -> Any:
    return {"kernel": jnp.zeros(shape)}


def norm(size: int = 8) -> Any:
    return {"scale": jnp.zeros(size)}


def residual_block(before: int, size: int, **others: Any) -> Any:
    convolutions = {"Conv_0": kernel(3, 3, before, size), "Conv_1": kernel(3, 3, size, size)}
    return {**convolutions, "BatchNorm_0": norm(size), "BatchNorm_1": norm(size), **others}


def block(dense: Any = None, **norms: Any) -> Any:
    """A block of a transformer."""
    parts = {name: {"kernel": jnp.zeros((8, 2, 4)), "bias": jnp.zeros((2, 4))} for name in ("query", "key", "value")}
    hidden = {"c_fc": kernel(8, 32), "c_proj": kernel(32, 8)}
    return {"attn": {**parts, "out": kernel(2, 4, 8)}, "ffn": hidden if dense is None else dense, **norms}


def transformer(*outside: str, inside: tuple[str, ...] = (), number: int = 2, **changes: Any) -> Any:
    """A transformer whose blocks are modules, with normalisation layers of these names."""
    blocks = {f"TransformerBlock_{i}": block(**{name: norm() for name in inside}) for i in range(number)}
    tables = {"wte": {"embedding": jnp.zeros((11, 8))}, "wpe": {"embedding": jnp.zeros((9, 8))}}
    return {**tables, **blocks, **{name: norm() for name in outside}, "lm_head": kernel(8, 11), **changes}


MODELS = {
    "mlp": lambda: init(MLP(10, (12, 7)), jnp.zeros((1, 2, 2, 1))),
    **{name: (lambda name=name: model_of(name)) for name in ("cnn-8-16-32", "vgg", "transformer-2x24")},
    "resnet": lambda: {
        **{"conv_init": kernel(3, 3, 3, 6), "bn_init": norm(6), "ResNetBlock_0": residual_block(6, 6)},
        "ResNetBlock_1": residual_block(6, 8, conv_proj=kernel(1, 1, 6, 8), norm_proj=norm(8)),
        "Dense_0": kernel(8, 10),
    },
    "transformer": lambda: transformer("ln_f", inside=("ln_1", "ln_2")),
}


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

CONVOLUTIONS = {"conv1": kernel(3, 3, 3, 8), "conv2": kernel(3, 3, 8, 8)}
RESIDUAL = {"conv_init": kernel(3, 3, 3, 8), "head": kernel(8, 2)}
NO_QKV = {"attn": {"c_attn": kernel(8, 20), "c_proj": kernel(8, 8)}, "query": kernel(8, 8)}


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


# Descriptions that are given


def edge(path: str, names: Any) -> Any:
    return {"edges": {**neural_graph(model_of("mlp-64"))["edges"], path: names}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": []}, "must be a mapping with 'edges'"),
        ({"nodes": {}}, "graph has the unknown part 'nodes'"),
        ({"kinds": {"Dense_0/bias": "self"}}, r"graph\['kinds'\] has the unknown kind 'self' for 'Dense_0/bias'"),
        ({"kinds": {"Dense_7/bias": "bias"}}, r"graph\['kinds'\] names 'Dense_7/bias', but the parameters have no"),
        ({"kinds": ["query"]}, r"graph\['kinds'\]=\['query'\] must be a mapping"),
        ({"residual": ["input"]}, r"graph\['residual'\]=\['input'\] must be pairs"),
        ({"residual": [["input", "elsewhere"]]}, r"graph\['residual'\] names 'elsewhere'"),
        ({"residual": [["input", "dense_0"]]}, "'input' with 'dense_0', but these are 768 and 64 neurons"),
        ({"heads": {"dense_0": 7}}, r"graph\['heads'\] has 7 heads for the 64 neurons 'dense_0'"),
        ({"heads": {"dense_0": 0}}, r"graph\['heads'\]\['dense_0'\]=0 must be an int >= 1: how many heads"),
        ({"heads": {"elsewhere": 2}}, r"graph\['heads'\] names 'elsewhere'"),
        ({"positions": "x"}, r"graph\['positions'\] must be 8 numbers for each node"),
        ({"positions": np.zeros([3, 8])}, r"graph\['positions'\] has the shape \(3, 8\)"),
        ({"parts": {"Dense_2/kernel": ["a"]}}, r"graph\['parts'\] names 'Dense_2/kernel', but the parameters have no"),
        ({"parts": {"Dense_0/kernel": ["a", "a"]}}, "must be different names that divide the 64 outputs"),
        ({"parts": {"Dense_0/kernel": ["a", "b", "c"]}}, "must be different names that divide"),
        ({"parts": {"Dense_0/kernel": ["a", "b"]}}, "it has no edges for the leaf 'Dense_0/kernel:a'"),
        (edge("Dense_0/bias", ["input", "dense_0"]), r"must be one name .*, because the leaf has the shape \(64,\)"),
        (edge("Dense_0/kernel", ["dense_0"]), "must be two names of neurons"),
        (edge("Dense_0/kernel", None), r"graph\['edges'\]\['Dense_0/kernel'\]=None must be a list of names"),
        (edge("Dense_1/bias", ["dense_0"]), "'Dense_1/bias' has 10 of the neurons 'dense_0', but there are 64"),
        (edge("Dense_2/bias", ["dense_0"]), "graph is of another model: the parameters have no leaf 'Dense_2/bias'"),
    ],
)
def test_a_description_that_makes_no_graph(changes: Any, message: str):
    params = model_of("mlp-64")
    with pytest.raises(ValueError, match=message):
        graph_of(params, {**neural_graph(params), **changes})
    with pytest.raises(ValueError, match="graph='chain' must be a mapping with 'edges'"):
        graph_of(params, "chain")


def test_a_graph_of_another_model():
    params, description = model_of("mlp-64"), neural_graph(model_of("mlp-64"))
    with pytest.raises(ValueError, match="graph is of another model: it has no edges for the leaf 'Dense_1/bias'"):
        graph_of(params, neural_graph({"Dense_0": params["Dense_0"]}))
    narrow = {**init(MLP(10, (65,)), IMAGES), "Dense_1": params["Dense_1"]}
    with pytest.raises(ValueError, match=r"the leaf 'Dense_1/kernel' of shape \(64, 10\) has 64 inputs, but 'dense_0'"):
        graph_of(narrow, description)
    with pytest.raises(ValueError, match=r"'conv2/kernel' of shape \(3, 3, 16, 8\) has 16 inputs, but 'conv1'"):
        graph_of({**CONVOLUTIONS, "conv2": kernel(3, 3, 16, 8)}, neural_graph(CONVOLUTIONS))


def test_a_model_that_no_builder_knows_can_be_described():
    """An autoencoder with a connection from its input to its output."""
    params = {"decoder": kernel(4, 8), "encoder": kernel(8, 4)}
    edges = {"encoder/kernel": ["input", "code"], "decoder/kernel": ["code", "output"]}
    graph = graph_of(params, {"edges": edges, "residual": [["input", "output"]], "heads": {"code": np.int64(2)}})
    residual = [edge[:2] for edge in edges_of(graph, params) if edge[2] == KINDS["residual"]]
    assert residual == [(node, node + 14) for node in range(8)]
    # The leaf of the decoder comes first.
    assert [block.ends.first_row for block in graph.blocks] == [10, 0]


# Nodes and edges


def test_every_node_has_a_loop_and_its_degree(params: Any):
    graph = graph_of(params)
    edges = edges_of(graph, params)
    nodes = range(len(graph.positions))
    degrees = np.bincount([target for _, target, _ in edges], minlength=len(nodes))
    np.testing.assert_array_equal(graph.degrees, degrees)
    assert {(node, node, KINDS["self"]) for node in nodes} <= set(edges)
    assert {node for edge in edges if edge[0] != edge[1] for node in edge[:2]} == set(nodes)


def test_a_depthwise_convolution_connects_each_channel_with_itself():
    params = {"Conv_0": kernel(1, 1, 3, 5), "Conv_1": kernel(3, 3, 1, 5)}
    description = {"edges": {"Conv_0/kernel": ["input", "first"], "Conv_1/kernel": ["first", "second"]}}
    edges = edges_of(graph_of(params, description), params)
    own = [edge[:2] for edge in edges if edge[0] in range(3, 8) and edge[0] != edge[1]]
    assert own == [(i, i + 5) for i in range(3, 8)]


def test_a_large_window_is_cut_into_edges_of_nine_elements():
    graph = graph_of(model_of("lenet"))
    assert graph.blocks[1].piece.tensor.cuts == [slice(0, 9), slice(9, 18), slice(18, 25)]
    # Three edges from each of 3 channels, one from the bias, and a loop.
    first = graph.blocks[1].ends.first_column
    np.testing.assert_array_equal(graph.degrees[first : first + 6], 3 * 3 + 1 + 1)


def test_layouts_are_read_and_written_back():
    rng = np.random.default_rng(0)
    for names, shape, role, sizes in (
        (("conv", "kernel"), (3, 2, 4, 5), "conv", (6, 4, 5)),
        (("conv", "weight"), (5, 4, 3, 2), "conv", (6, 4, 5)),
        (("linear", "weight"), (5, 4), "dense", (1, 4, 5)),
        (("query", "kernel"), (4, 2, 3), "dense", (1, 4, 6)),
        (("out", "kernel"), (2, 3, 4), "dense", (1, 6, 4)),
        (("query", "bias"), (2, 3), "bias", (1, 1, 6)),
        (("wte", "weight"), (7, 4), "embedding", (1, 7, 4)),
    ):
        tensor, leaf = Tensor("", names, shape, role), jnp.asarray(rng.normal(size=shape))
        matrix = tensor.to_matrix(leaf)
        assert tensor.sizes == list(sizes)
        assert matrix.shape == (sizes[0], sizes[1] * sizes[2])
        np.testing.assert_array_equal(tensor.from_matrix(matrix), leaf)


# Places of nodes


def assert_eigenvectors(graph: Graph, params: Any, number: int) -> None:
    vectors = graph.positions[:, :number].astype(np.float64)
    adjacency = np.zeros([len(vectors)] * 2)
    for source, target, _ in edges_of(graph, params):
        adjacency[source, target] = adjacency[target, source] = source != target
    inverse = 1 / np.sqrt(adjacency.sum(axis=0))
    laplacian = np.eye(len(vectors)) - inverse[:, None] * adjacency * inverse[None]
    values = np.linalg.eigvalsh(laplacian)[1 : number + 1]
    np.testing.assert_allclose(laplacian @ vectors, vectors * values[None], atol=1e-6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(number), atol=1e-5)
    largest = np.abs(vectors).max(axis=0)
    assert all(vectors[np.abs(vectors[:, i]) > 0.9999 * largest[i], i].max() > 0 for i in range(number))


def test_places_are_eigenvectors_of_the_laplacian(params: Any):
    assert_eigenvectors(graph_of(params), params, 8)
    np.testing.assert_array_equal(graph_of(params).positions, graph_of(params).positions)


def test_a_graph_of_few_nodes_has_fewer_places():
    vectors = graph_of({"Dense_0": kernel(1, 2)}).positions
    assert vectors.shape == (3, 8)
    assert np.abs(vectors[:, :2]).min(axis=0).max() > 0
    np.testing.assert_array_equal(vectors[:, 2:], 0)


def test_neurons_that_are_connected_among_themselves():
    """Edges from some neurons to the same ones, as in a recurrent layer, but from none to itself."""
    params = {"recurrent": kernel(5, 5), "input": kernel(3, 5)}
    description = {"edges": {"input/kernel": ["input", "state"], "recurrent/kernel": ["state", "state"]}}
    assert_eigenvectors(graph_of(params, description), params, 7)
