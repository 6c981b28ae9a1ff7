"""The neural graph of a model: what is read from names and shapes, and what follows from it."""

import itertools
import json
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnn_jax
from wnn_jax.lab.tasks.models import ARCHITECTURES, LSTM, MLP, UNet, takes_train
from wnn_jax.nowcasters import neural_graph
from wnn_jax.nowcasters.nino._description import build_graph
from wnn_jax.nowcasters.nino._graph import KINDS, Graph, Tensor, layout_of
from wnn_jax.nowcasters.nino._laplacian import laplacian_eigenvectors
from wnn_jax.nowcasters.nino.nowcaster import tensors_of

IMAGES = jnp.zeros((1, 16, 16, 3))
TOKENS = jnp.zeros((1, 8), jnp.int32)


def init(model: nn.Module, *inputs: Any) -> Any:
    train: dict[str, Any] = {"train": True} if takes_train(model) else {}
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **train))["params"]


def graph_of(params: Any, description: Any = None) -> Graph:
    description = neural_graph(params) if description is None else description
    return build_graph(description, tensors_of(params, wnn_jax.default_roles(params))[0])


def edges_of(graph: Graph, params: Any) -> list[tuple[int, int, int]]:
    """Source, target and kind of every edge, sorted."""
    edges = list(zip(graph.sources.tolist(), graph.targets.tolist(), graph.kinds.tolist(), strict=True))
    for leaf, block in zip(jax.tree.leaves(params), graph.blocks, strict=True):
        _, rows, columns = block.layout.sizes(leaf.shape)
        ends = block.ends.at(np.arange(rows * columns), np)
        edges += [(int(source), int(target), block.kind) for source, target in zip(*ends, strict=True)]
    return sorted(edges)


def eigenvectors(graph: Graph, number: int) -> np.ndarray:
    return laplacian_eigenvectors(graph.links, graph.num_nodes, number)


def dense_laplacian(graph: Graph, params: Any) -> np.ndarray:
    adjacency = np.zeros([graph.num_nodes] * 2)
    for source, target, _ in edges_of(graph, params):
        adjacency[source, target] = adjacency[target, source] = source != target
    inverse = 1 / np.sqrt(adjacency.sum(axis=0))
    return np.eye(graph.num_nodes) - inverse[:, None] * adjacency * inverse[None]


class Nested(nn.Module):
    """A residual network as Flax's example has it: blocks with names, projections where widths change."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True, name="bn_init")(nn.Conv(4, (3, 3), name="conv_init")(x))
        for features in (4, 6):
            x = ResNetBlock(features)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class ResNetBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branch = nn.BatchNorm(use_running_average=True)(nn.Conv(self.features, (3, 3), use_bias=False)(x))
        branch = nn.BatchNorm(use_running_average=True)(nn.Conv(self.features, (3, 3), use_bias=False)(branch))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="conv_proj")(x)
            x = nn.BatchNorm(use_running_average=True, name="norm_proj")(x)
        return x + branch


class Transformer(nn.Module):
    """Blocks with names of their own, with the dense layers in a module."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(11, 8, name="wte")(tokens) + nn.Embed(8, 8, name="wpe")(jnp.arange(8))[None]
        for _ in range(2):
            x = TransformerBlock()(x)
        return nn.Dense(11, name="lm_head")(nn.LayerNorm(name="ln_f")(x))


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm(name="ln_1")(x))
        return x + Hidden(name="mlp")(nn.LayerNorm(name="ln_2")(x))


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8, name="c_proj")(nn.gelu(nn.Dense(32, name="c_fc")(x)))


def model_of(name: str) -> Any:
    inputs = TOKENS if "transformer" in name else IMAGES
    return init(ARCHITECTURES[name](10), inputs)


MODELS = {
    **{name: (lambda name=name: model_of(name)) for name in ("mlp-128-64", "cnn-8-16-32", "vgg", "transformer-2x24")},
    "resnet": lambda: init(Nested(), IMAGES),
    "transformer": lambda: init(Transformer(), TOKENS),
}


@pytest.fixture(scope="module", params=MODELS)
def params(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


# Reading


def test_a_chain():
    edges = neural_graph(model_of("cnn-8-16-32"))["edges"]
    kernels = {path: names for path, names in edges.items() if path.endswith("kernel")}
    # The classifier is made before the hidden layer that comes before it.
    assert kernels == {
        "Conv_0/kernel": ["input", "conv_0"],
        "Conv_1/kernel": ["conv_0", "conv_1"],
        "Conv_2/kernel": ["conv_1", "conv_2"],
        "Dense_0/kernel": ["conv_2", "dense_0"],
        "Dense_1/kernel": ["dense_0", "dense_1"],
    }
    assert edges["Dense_0/bias"] == ["dense_0"]


def test_dense_layers_whose_numbers_go_backwards():
    edges = neural_graph(model_of("vgg"))["edges"]
    assert edges["Dense_1/kernel"] == ["convnorm_3/conv_0", "dense_1"]
    assert edges["Dense_0/kernel"] == ["dense_1", "dense_0"]
    assert edges["ConvNorm_2/BatchNorm_0/scale"] == ["convnorm_2/conv_0"]


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
    norm = "TransformerBlock_1/ln_1" if name == "transformer" else "LayerNorm_2"
    assert edges[f"{norm}/scale"] == [before]
    last = "ln_f" if name == "transformer" else "LayerNorm_4"
    assert edges[f"{last}/scale"] == [description["residual"][-1][1]]


def test_residual_blocks():
    description = neural_graph(MODELS["resnet"]())
    edges = description["edges"]
    assert description["residual"] == [["conv_init", "resnetblock_0/conv_1"]]
    assert edges["ResNetBlock_1/conv_proj/kernel"] == ["resnetblock_0/conv_1", "resnetblock_1/conv_1"]
    assert edges["ResNetBlock_1/norm_proj/scale"] == ["resnetblock_1/conv_1"]
    assert edges["ResNetBlock_1/BatchNorm_0/scale"] == ["resnetblock_1/conv_0"]
    assert edges["bn_init/scale"] == ["conv_init"]
    assert edges["Dense_0/kernel"] == ["resnetblock_1/conv_1", "dense_0"]


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.linear1 = nnx.Linear(64, 6, rngs=rngs)
        self.linear2 = nnx.Linear(6, 10, rngs=rngs)


class EquinoxModel(eqx.Module):
    conv: eqx.nn.Conv2d
    layers: list[eqx.nn.Linear]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=keys[0])
        self.layers = [eqx.nn.Linear(64, 6, key=keys[1]), eqx.nn.Linear(6, 10, key=keys[2])]


def haiku_model() -> Any:
    network = hk.transform(
        lambda x: hk.nets.MLP([6, 10])(hk.Flatten()(hk.Conv2D(4, 3, padding="VALID")(x)))  # pyright: ignore[reportArgumentType]
    )
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 6, 6, 3)))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (nnx.LayerNorm(8, rngs=rngs) for _ in range(3))
        self.linear3 = nnx.Linear(8, 7, rngs=rngs)


class EquinoxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    linears: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(7, 8, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=keys[1])
        sizes = zip([(8, 16), (16, 8), (8, 7)], keys[2:], strict=True)
        self.linears = [eqx.nn.Linear(*size, key=key) for size, key in sizes]
        self.norms = [eqx.nn.LayerNorm(8) for _ in range(3)]


@pytest.mark.parametrize("framework", ["nnx", "equinox"])
def test_transformers_of_other_frameworks(framework: str):
    if framework == "nnx":
        params: Any = nnx.state(nnx.eval_shape(lambda: NnxTransformer(nnx.Rngs(0))), nnx.Param)
    else:
        params = jax.eval_shape(lambda: eqx.filter(EquinoxTransformer(jax.random.key(0)), eqx.is_inexact_array))
    if framework == "equinox":
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
    graph = graph_of(params, description)
    assert graph.num_nodes > 0
    assert np.isfinite(graph.positions).all()


def with_joined_attention(params: Any, heads: tuple[int, ...]) -> Any:
    """The transformer with the layer that GPT-2 has in the place of three, with an axis of heads or without one."""
    blocks = {
        name: {
            **block,
            "attn": {
                "c_attn": {
                    "kernel": jnp.zeros((8, 3, *heads, 4) if heads else (8, 24)),
                    "bias": jnp.zeros((3, *heads, 4) if heads else 24),
                },
                "c_proj": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)},
            },
        }
        for name, block in params.items()
        if name.startswith("TransformerBlock")
    }
    return {**params, **blocks}


@pytest.mark.parametrize("heads", [(), (2,)])
def test_queries_keys_and_values_in_one_leaf(heads: tuple[int, ...]):
    """The graph is that of three leaves."""
    separate = MODELS["transformer"]()
    joined = with_joined_attention(separate, heads)
    description, expected = neural_graph(joined, num_heads=2), neural_graph(separate)
    names = {
        f"TransformerBlock_{block}/attn/{part}/{leaf}": (
            f"TransformerBlock_{block}/attn/" + (f"c_proj/{leaf}" if part == "out" else f"c_attn/{leaf}:{part}")
        )
        for block in range(2)
        for part in ("query", "key", "value", "out")
        for leaf in ("kernel", "bias")
    }
    for what in ("edges", "kinds"):
        renamed = {names.get(path, path): value for path, value in expected[what].items()}
        assert description[what] == renamed
    assert [description[what] for what in ("heads", "residual")] == [expected[what] for what in ("heads", "residual")]
    graph, graph_of_three = graph_of(joined, description), graph_of(separate, expected)
    assert graph.num_nodes == graph_of_three.num_nodes
    assert sorted(graph.degrees) == sorted(graph_of_three.degrees)
    if not heads:
        with pytest.raises(ValueError, match=r"'TransformerBlock_0/attn/c_attn/kernel:query'.*how many heads"):
            neural_graph(joined)


def test_a_layer_that_cannot_be_three_is_none():
    joined = with_joined_attention(MODELS["transformer"](), ())
    joined["TransformerBlock_0"]["attn"]["c_attn"] = {"kernel": jnp.zeros((8, 20)), "bias": jnp.zeros(20)}
    with pytest.raises(ValueError, match="NiNo cannot tell how the model is connected"):
        neural_graph(joined, num_heads=2)


FRAMEWORKS = {
    "nnx": lambda: nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param),
    "equinox": lambda: jax.eval_shape(lambda: eqx.filter(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)),
    "haiku": haiku_model,
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_names_of_every_framework(name: str):
    params = FRAMEWORKS[name]()
    edges = neural_graph(params)["edges"]
    matrices = [names for names in edges.values() if len(names) == 2]
    assert [names[0] for names in matrices[1:]] == [names[1] for names in matrices[:-1]]
    assert len(matrices) == 3
    graph = graph_of(params)
    # 16 flattened positions of 4 channels: each channel has an edge from each position to each of 6 neurons.
    pairs = [edge for edge in edges_of(graph, params) if edge[2] == KINDS["dense"]]
    assert len(pairs) == 64 * 6 + 6 * 10
    assert len(set(pairs)) == 4 * 6 + 6 * 10


def test_flattened_channels_come_last_or_first():
    """Rows of the same channel belong to the same neuron: every fourth as Flax has it, 16 in a row in Equinox."""
    flax, equinox = FRAMEWORKS["nnx"](), FRAMEWORKS["equinox"]()
    for params, leaf, expected in ((flax, "linear1", np.arange(64) % 4), (equinox, "layers", np.arange(64) // 16)):
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        index = next(i for i, path in enumerate(paths) if leaf in path and ("kernel" in path or "weight" in path))
        ends = graph_of(params).blocks[index].ends
        sources, targets = ends.at(np.arange(64 * 6), np)
        np.testing.assert_array_equal(sources.reshape(64, 6)[:, 0] - ends.first_row, expected)
        np.testing.assert_array_equal(targets.reshape(64, 6)[0] - ends.first_column, np.arange(6))


def test_a_description_is_json(params: Any):
    description = neural_graph(params)
    assert json.loads(json.dumps(description)) == description


# What cannot be read


def kernel(*shape: int) -> Any:
    return {"kernel": jnp.zeros(shape)}


def norm(size: int = 8) -> Any:
    return {"scale": jnp.zeros(size)}


def block(**norms: Any) -> Any:
    """Of a transformer."""
    parts = {name: kernel(8, 2, 4) for name in ("query", "key", "value")}
    return {"attn": {**parts, "out": kernel(2, 4, 8)}, "mlp": {"w1": kernel(8, 32), "w2": kernel(32, 8)}, **norms}


def pair(one: tuple[int, int], other: tuple[int, int], names: tuple[str, str] = ("encoder", "decoder")) -> Any:
    return {name: {"kernel": jnp.zeros(shape)} for name, shape in zip(names, (one, other), strict=True)}


@pytest.mark.parametrize(
    ("make", "leaf", "reason"),
    [
        (lambda: init(ARCHITECTURES["resnet"](10), IMAGES), "Conv_5/kernel", "its inputs are the outputs of no layer"),
        (lambda: init(ARCHITECTURES["densenet"](10), IMAGES), "ConvNorm_2/Conv_0/kernel", "outputs of no layer"),
        (lambda: init(LSTM(5), TOKENS), "OptimizedLSTMCell_0/", "could come before"),
        (lambda: init(UNet(), IMAGES, jnp.zeros(1)), "ResidualBlock_0/", "its inputs are the outputs of no layer"),
        (lambda: pair((8, 4), (4, 8)), "decoder/kernel", "its module could come before 'encoder'"),
        (lambda: pair((8, 4), (5, 7)), "encoder/kernel", "its inputs are the outputs of no layer before it"),
        (lambda: {**pair((8, 4), (4, 3)), "cls": jnp.zeros([1, 8])}, "cls", "it lies beside other modules"),
        (
            lambda: {**pair((8, 4), (4, 4)), "norm": {"scale": jnp.zeros(4)}},
            "norm/scale",
            "there are 2 layers of its size, and 1 such norms",
        ),
        (
            lambda: {"attention": pair((4, 4), (4, 4), ("query", "key"))},
            "attention/",
            "has no queries, keys and values",
        ),
        (lambda: pair((0, 4), (4, 2)), "encoder/kernel", "it is empty"),
        (lambda: {"Dense_0": kernel(3, 8), "layers": kernel(4, 8, 8), "head": kernel(8, 2)}, "layers", "of no layer"),
    ],
    ids=[
        *("residual", "dense", "recurrent", "unet", "both orders", "no order", "parameter", "norms", "attention"),
        *("empty", "scanned"),
    ],
)
def test_what_cannot_be_read_is_refused_by_a_leaf(make: Any, leaf: str, reason: str):
    with pytest.raises(ValueError, match=rf"the leaf '{leaf}.*{reason}.*NiNo\(graph=\.\.\.\)"):
        neural_graph(make())


class Generator(nn.Module):
    """Makes images, by convolutions of a class, of what a dense layer gives out."""

    convolution: Any
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(7 * 7 * 16)(x).reshape(-1, 7, 7, 16)
        x = self.convolution(8, (3, 3))(x)
        return self.convolution(self.channels, (3, 3))(x)


RESIDUAL = {"Dense_0": kernel(3, 8), "head": kernel(8, 2)}
CONVOLUTIONS = {"conv1": kernel(3, 3, 3, 8), "conv2": kernel(3, 3, 8, 8)}


@pytest.mark.parametrize(
    ("params", "leaf", "reason"),
    [
        (init(Generator(nn.ConvTranspose, 1), jnp.zeros((1, 64))), "Dense_0/", "before a transposed convolution"),
        (init(Generator(nn.Conv, 3), jnp.zeros((1, 48))), "Dense_0/", "it may come before the convolutions"),
        ({"Conv_0": kernel(3, 3, 3, 1), "Dense_0": kernel(64, 8)}, "Dense_0/", "outputs of no layer before it"),
        ({"Embed_0": {"embedding": jnp.zeros((10, 3))}, "Conv_0": kernel(3, 3, 3, 8)}, "Conv_0/", "of no layer"),
        ({"actor": kernel(4, 4), "critic": kernel(4, 1)}, "critic/", "may be beside 'actor'"),
        ({**CONVOLUTIONS, "SE_0": pair((8, 2), (2, 8), ("a", "b"))}, "SE_0/a/", "a module beside the layers"),
        ({**RESIDUAL, "SelfAttention_0": pair((8, 8), (8, 8), ("a1", "a2"))}, "SelfAttention_0/a", "no queries"),
        ({**RESIDUAL, "ResBlock_0": pair((8, 8), (8, 8), ("fc", "proj"))}, "ResBlock_0/proj/", "or the projection"),
        ({**RESIDUAL, "blocks": [pair((8, 8), (8, 8), ("a1", "a2"))]}, "blocks/0/", "whether a residual connection"),
        ({**CONVOLUTIONS, "second": norm(), "first": norm()}, "second/", "it may come before 'first' or behind it"),
        ({**CONVOLUTIONS, "PReLU_0": {"negative_slope": jnp.zeros([])}}, "PReLU_0/", "it is one number"),
        ({"wte": {"embedding": jnp.zeros((11, 8))}, "Block_0": block(ln=norm())}, "Block_0/ln/", "0 places for it"),
        (
            {
                "wte": {"embedding": jnp.zeros((11, 8))},
                "Block_0": {**block(), "mlp": {**block()["mlp"], "w3": kernel(8, 32)}},
            },
            "Block_0/mlp/",
            "there are 3 layers after attention",
        ),
    ],
    ids=[
        *("transposed", "generator", "one channel", "class", "side by side", "gate", "attention", "projection"),
        *("block", "norms", "scalar", "parallel", "gated"),
    ],
)
def test_a_model_that_could_be_connected_in_another_way_is_refused(params: Any, leaf: str, reason: str):
    with pytest.raises(ValueError, match=rf"the leaf '{leaf}.*{reason}"):
        neural_graph(params)


@pytest.mark.parametrize(
    ("name", "is_residual"),
    [
        *(
            (name, True)
            for name in ("ResNetBlock", "BottleneckResNetBlock", "ResidualBlock", "res_block", "BasicBlock")
        ),
        *((name, True) for name in ("PreActResBlock", "PreActBlock", "bottleneck_block", "encoder_ResBlock")),
        *(
            (name, False)
            for name in ("RegressionBlock", "CompressBlock", "BasicConvBlock", "ConvBlock", "ProgressBlock")
        ),
    ],
)
def test_a_block_is_residual_by_its_name(name: str, is_residual: bool):
    params = {**RESIDUAL, f"{name}_0": {"Dense_0": kernel(8, 8), "Dense_1": kernel(8, 8)}}
    expected = [["dense_0", f"{name}_0/dense_1".lower()]] if is_residual else None
    assert neural_graph(params).get("residual") == expected


@pytest.mark.parametrize(
    ("outside", "inside", "expected"),
    [
        ({"ln_f": 1}, {}, {"ln_f": "block_0/mlp/w2"}),
        ({"LayerNorm_0": 1}, {}, {"LayerNorm_0": "block_0/mlp/w2"}),
        ({"embed_ln": 1}, {}, {"embed_ln": "wte"}),
        ({"embed_ln": 1, "ln_f": 1}, {}, {"embed_ln": "wte", "ln_f": "block_0/mlp/w2"}),
        ({}, {"self_attention_norm": 1, "feed_forward_norm": 1}, {"self_attention_norm": "wte"}),
        ({}, {"input_layernorm": 1, "post_attention_layernorm": 1}, {"post_attention_layernorm": "block_0/attn"}),
        ({}, {"norm1": 1, "norm2": 1, "final_norm": 1}, {"norm2": "block_0/attn", "final_norm": "block_0/mlp/w2"}),
    ],
)
def test_norms_of_a_transformer_are_where_their_names_say(outside: Any, inside: Any, expected: dict[str, str]):
    params = {"wte": {"embedding": jnp.zeros((11, 8))}, "Block_0": block(**dict.fromkeys(inside, norm()))}
    edges = neural_graph({**params, **dict.fromkeys(outside, norm()), "head": kernel(8, 11)})["edges"]
    places = {path.split("/")[-2]: names[0] for path, names in edges.items() if path.endswith("scale")}
    assert len(places) == len(outside) + len(inside)
    assert expected.items() <= places.items()


def test_norms_of_a_preactivated_block_come_before_its_layers():
    layers = {"a1": kernel(3, 8), "a2": kernel(8, 8), "norm1": norm(3), "norm2": norm()}
    edges = neural_graph({"Dense_0": kernel(3, 3), "PreActResBlock_0": layers})["edges"]
    assert edges["PreActResBlock_0/norm1/scale"] == ["dense_0"]
    assert edges["PreActResBlock_0/norm2/scale"] == ["preactresblock_0/a1"]


def test_attention_without_a_projection_back():
    params = MODELS["transformer"]()
    del params["TransformerBlock_0"]["attn"]["out"]
    with pytest.raises(ValueError, match=r"'TransformerBlock_0/attn/.*its attention has no projection back"):
        neural_graph(params)


def test_a_large_window_is_cut_into_edges_of_nine_elements():
    graph = graph_of(model_of("lenet"))
    kernel = graph.blocks[1]
    assert kernel.layout.cuts((5, 5, 3, 6)) == [slice(0, 9), slice(9, 18), slice(18, 25)]
    # Three edges from each of 3 channels, one from the bias, and a loop.
    first = kernel.ends.first_column
    np.testing.assert_array_equal(graph.degrees[first : first + 6], 3 * 3 + 1 + 1)


# Graphs that are given


def test_a_graph_of_another_model_is_refused_by_the_first_leaf_that_differs():
    params, description = model_of("mlp-64"), neural_graph(model_of("mlp-64"))
    smaller = {name: layer for name, layer in params.items() if name != "Dense_1"}
    with pytest.raises(ValueError, match="graph is of another model: the parameters have no leaf 'Dense_1/"):
        graph_of(smaller, description)
    with pytest.raises(ValueError, match="graph is of another model: it has no edges for the leaf 'Dense_1/bias'"):
        graph_of(params, neural_graph(smaller))
    wider = init(MLP(10, (65,)), IMAGES)
    narrow = {**wider, "Dense_1": params["Dense_1"]}
    with pytest.raises(ValueError, match=r"the leaf 'Dense_1/kernel' of shape \(64, 10\) has 64 inputs, but 'dense_0'"):
        graph_of(narrow, description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": []}, "must be a mapping with 'edges'"),
        ({"nodes": {}}, "graph has the unknown part 'nodes'"),
        (
            {"kinds": {"Dense_0/bias": "queries"}},
            "graph\\['kinds'\\] has the unknown kind 'queries' for 'Dense_0/bias'",
        ),
        ({"residual": [["input", "elsewhere"]]}, "graph\\['residual'\\] names 'elsewhere'"),
        ({"residual": [["input", "dense_0"]]}, "'input' with 'dense_0', but these are 768 and 64 neurons"),
        ({"heads": {"dense_0": 7}}, "graph\\['heads'\\] has 7 heads for the 64 neurons 'dense_0'"),
        ({"heads": {"elsewhere": 2}}, "graph\\['heads'\\] names 'elsewhere'"),
        ({"heads": {"dense_0": "two"}}, "graph\\['heads'\\]\\['dense_0'\\]='two' must be an int"),
        ({"heads": "two"}, "graph\\['heads'\\]='two' must be a mapping"),
        ({"kinds": ["query"]}, "graph\\['kinds'\\]=\\['query'\\] must be a mapping"),
        ({"kinds": {"Dense_0/bias": "self"}}, "the unknown kind 'self' for 'Dense_0/bias'"),
        (
            {"kinds": {"Dense_7/bias": "bias"}},
            "graph\\['kinds'\\] names 'Dense_7/bias', but the parameters have no such",
        ),
        ({"residual": ["input"]}, "graph\\['residual'\\]=\\['input'\\] must be pairs"),
        ({"positions": "x"}, "graph\\['positions'\\] must be 8 numbers for each node"),
        ({"positions": np.zeros([3, 8])}, "graph\\['positions'\\] has the shape \\(3, 8\\)"),
    ],
)
def test_a_description_that_makes_no_graph(change: Any, message: str):
    params = model_of("mlp-64")
    with pytest.raises(ValueError, match=message):
        graph_of(params, {**neural_graph(params), **change})


def test_heads_may_be_numbers_of_numpy():
    params = MODELS["transformer"]()
    description = neural_graph(params)
    heads = {name: np.int64(number) for name, number in description["heads"].items()}
    assert graph_of(params, {**description, "heads": heads}).links == graph_of(params, description).links
    with pytest.raises(ValueError, match=r"graph\['heads'\]\['wte'\]=0 must be an int >= 1: how many heads"):
        graph_of(params, {**description, "heads": {"wte": 0}})


def test_a_convolution_has_as_many_inputs_as_there_are_neurons():
    description = neural_graph(CONVOLUTIONS)
    with pytest.raises(
        ValueError, match=r"the leaf 'conv2/kernel' of shape \(3, 3, 16, 8\) has 16 inputs, but 'conv1'"
    ):
        graph_of({**CONVOLUTIONS, "conv2": kernel(3, 3, 16, 8)}, description)


@pytest.mark.parametrize("role", ["dense", "conv", "embedding"])
def test_a_role_that_has_more_axes(role: str):
    with pytest.raises(ValueError, match=rf"no edges for the leaf 'w' of shape \(5,\) as '{role}'.*'bias' or 'norm'"):
        neural_graph({"w": jnp.zeros(5)}, {"w": role})


def test_an_array_is_a_model():
    assert neural_graph(jnp.zeros((3, 4)))["edges"] == {"": ["input", "model"]}


def test_a_description_of_another_form():
    with pytest.raises(ValueError, match="graph='chain' must be a mapping with 'edges'"):
        graph_of(model_of("mlp-64"), "chain")


@pytest.mark.parametrize(
    ("path", "names", "message"),
    [
        ("Dense_0/bias", ["input", "dense_0"], "must be one name of neurons, for the leaf has the shape \\(64,\\)"),
        ("Dense_0/kernel", ["dense_0"], "must be two names of neurons"),
        ("Dense_0/kernel", None, "graph\\['edges'\\]\\['Dense_0/kernel'\\]=None must be a list of names"),
        ("Dense_1/bias", ["dense_0"], "the leaf 'Dense_1/bias' has 10 of the neurons 'dense_0', of which there are 64"),
    ],
)
def test_edges_that_do_not_fit_a_leaf(path: str, names: Any, message: str):
    params = model_of("mlp-64")
    description = neural_graph(params)
    description["edges"][path] = names
    with pytest.raises(ValueError, match=message):
        graph_of(params, description)


def test_a_model_that_cannot_be_read_can_be_described():
    """An autoencoder, whose order nothing tells, with a connection from its input to its output."""
    params = pair((8, 4), (4, 8))
    edges = {"encoder/kernel": ["input", "code"], "decoder/kernel": ["code", "output"]}
    graph = graph_of(params, {"edges": edges, "residual": [["input", "output"]]})
    residual = [edge[:2] for edge in edges_of(graph, params) if edge[2] == KINDS["residual"]]
    assert residual == [(node, node + 12) for node in range(8)]
    # The leaf of the decoder comes first.
    assert [block.ends.first_row for block in graph.blocks] == [8, 0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"Dense_2/kernel": ["a", "b"]},
            "graph\\['parts'\\] names 'Dense_2/kernel', but the parameters have no such leaf",
        ),
        ({"Dense_0/kernel": ["a", "a"]}, r"must be different names, in equal parts of which the 64 outputs"),
        ({"Dense_0/kernel": ["a", "b", "c"]}, r"must be different names, in equal parts of which the 64 outputs"),
        ({"Dense_0/kernel": ["a", "b"]}, "it has no edges for the leaf 'Dense_0/kernel:a' of the parameters"),
    ],
)
def test_parts_that_a_leaf_does_not_have(parts: dict[str, list[str]], message: str):
    params = model_of("mlp-64")
    with pytest.raises(ValueError, match=message):
        graph_of(params, {**neural_graph(params), "parts": parts})


# Nodes and edges


def test_every_node_has_a_loop_and_its_degree(params: Any):
    graph = graph_of(params)
    edges = edges_of(graph, params)
    degrees = np.bincount([target for _, target, _ in edges], minlength=graph.num_nodes)
    np.testing.assert_array_equal(graph.degrees, degrees)
    assert {(node, node, KINDS["self"]) for node in range(graph.num_nodes)} <= set(edges)
    assert {node for edge in edges if edge[0] != edge[1] for node in edge[:2]} == set(range(graph.num_nodes))


def test_a_depthwise_convolution_connects_each_channel_with_itself():
    params = {"Conv_0": {"kernel": jnp.zeros((1, 1, 3, 5))}, "Conv_1": {"kernel": jnp.zeros((3, 3, 1, 5))}}
    edges = edges_of(graph_of(params), params)
    assert [edge[:2] for edge in edges if edge[0] in range(3, 8) and edge[0] != edge[1]] == [
        (i, i + 5) for i in range(3, 8)
    ]


def test_layouts_are_read_and_written_back():
    rng = np.random.default_rng(0)
    for names, shape, role, sizes in (
        (("conv", "kernel"), (3, 2, 4, 5), "conv", (6, 4, 5)),
        (("conv", "weight"), (5, 4, 3, 2), "conv", (6, 4, 5)),
        (("linear", "weight"), (5, 4), "dense", (1, 4, 5)),
        (("query", "kernel"), (4, 2, 3), "dense", (1, 4, 6)),
        (("proj", "kernel"), (4, 2, 3), "dense", (1, 4, 6)),
        (("out", "kernel"), (2, 3, 4), "dense", (1, 6, 4)),
        (("query", "bias"), (2, 3), "bias", (1, 1, 6)),
        (("wte", "weight"), (7, 4), "embedding", (1, 7, 4)),
    ):
        layout = layout_of(names, shape, role)
        leaf = jnp.asarray(rng.normal(size=shape))
        matrix = layout.to_matrix(leaf)
        assert layout.sizes(shape) == sizes
        assert matrix.shape == (sizes[0], sizes[1] * sizes[2])
        np.testing.assert_array_equal(layout.from_matrix(matrix, shape), leaf)
    kernel = jnp.arange(6.0).reshape(2, 3)
    flax = layout_of(("dense", "kernel"), (2, 3), "dense").to_matrix(kernel)
    equinox = layout_of(("linear", "weight"), (3, 2), "dense").to_matrix(kernel.T)
    np.testing.assert_array_equal(flax, equinox)


# Places of nodes


def test_places_are_eigenvectors_of_the_laplacian(params: Any):
    if sum(leaf.size for leaf in jax.tree.leaves(params)) > 60_000:
        params = init(MLP(10, (12, 7)), jnp.zeros((1, 2, 2, 1)))
    graph = graph_of(params)
    vectors = eigenvectors(graph, 8).astype(np.float64)
    laplacian = dense_laplacian(graph, params)
    values = np.linalg.eigvalsh(laplacian)[1:9]
    np.testing.assert_allclose(laplacian @ vectors, vectors * values[None], atol=1e-6)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-5)
    largest = np.abs(vectors).max(axis=0)
    assert all(vectors[np.abs(vectors[:, i]) > 0.9999 * largest[i], i].max() > 0 for i in range(8))


def test_places_are_always_the_same(params: Any):
    one, other = (eigenvectors(graph_of(params), 8) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_graph_of_few_nodes_has_fewer_places():
    params = {"Dense_0": {"kernel": jnp.zeros((1, 2))}}
    vectors = eigenvectors(graph_of(params), 8)
    assert vectors.shape == (3, 8)
    assert np.abs(vectors[:, :2]).min(axis=0).max() > 0
    np.testing.assert_array_equal(vectors[:, 2:], 0)


def test_neurons_that_are_connected_among_themselves():
    """Edges from some neurons to the same ones, as in a recurrent layer, but from none to itself."""
    params = {"recurrent": {"kernel": jnp.zeros((5, 5))}, "input": {"kernel": jnp.zeros((3, 5))}}
    description = {"edges": {"input/kernel": ["input", "state"], "recurrent/kernel": ["state", "state"]}}
    graph = graph_of(params, description)
    laplacian = dense_laplacian(graph, params)
    vectors = eigenvectors(graph, 7).astype(np.float64)
    np.testing.assert_allclose(laplacian @ vectors, vectors * np.linalg.eigvalsh(laplacian)[None, 1:], atol=1e-6)


def test_tensors_say_where_they_are():
    params = {"Dense_0": {"kernel": jnp.zeros((2, 3))}}
    ((tensor,), _) = tensors_of(params, {"Dense_0": {"kernel": "dense"}})
    assert tensor == Tensor("Dense_0/kernel", ("dense_0", "kernel"), (2, 3), "dense")
