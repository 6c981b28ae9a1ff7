"""The neural graph that follows from a description."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.nowcasters.graphs import CONVOLUTIONS, IMAGES, MODELS, edges_of, graph_of, init, kernel, model_of
from wnn_jax.lab.tasks.models import MLP
from wnn_jax.nowcasters import neural_graph
from wnn_jax.nowcasters.nino._graph import KINDS, Graph, Tensor


@pytest.fixture(scope="module", params=MODELS)
def params(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


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
    # Flax has the outputs last, and the others have them first.
    for role, names, order in (("dense", ("linear", "weight"), (1, 0)), ("conv", ("conv", "weight"), (3, 2, 0, 1))):
        weights = jnp.asarray(rng.normal(size=(2, 3, 4, 5)[-len(order) :]))
        flax = Tensor("", (role, "kernel"), weights.shape, role).to_matrix(weights)
        others = weights.transpose(order)
        np.testing.assert_array_equal(flax, Tensor("", names, others.shape, role).to_matrix(others))


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
    graph = graph_of(params)
    assert_eigenvectors(graph, params, 8)
    np.testing.assert_array_equal(graph_of(params).positions, graph.positions)


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
