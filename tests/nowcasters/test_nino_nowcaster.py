"""NiNo against its equations and against the published code, and what it does with any tree of parameters."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests import reference
from tests.helpers import (
    assert_close,
    assert_dots_are_precise,
    assert_trees_close,
    bounded,
    published_arrays,
    published_file,
    pull_to_one,
    random_leaves,
    train,
)
from tests.nowcasters.graphs import edges_of, graph_of
from wnn_jax.nowcasters import NiNo, neural_graph
from wnn_jax.nowcasters.nino._graph import KINDS

WIDTH = 8
SHAPES = {
    "Conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "Conv_1": {"kernel": (1, 1, 4, 5), "bias": (5,)},
    "BatchNorm_1": {"scale": (5,), "bias": (5,)},
    "BatchNorm_0": {"scale": (4,), "bias": (4,)},
    "Dense_0": {"kernel": (20, 3), "bias": (3,)},
}


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def walk(shapes: Any = None, seed: int = 0, dtype: Any = jnp.float32) -> list[Any]:
    """Five snapshots of a model: a random walk, of a length of its own in every tensor."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(
        lambda shape: rng.normal(size=shape) + np.cumsum(rng.normal(size=(5, *shape)) * rng.uniform(0.01, 1), axis=0),
        SHAPES if shapes is None else shapes,
        is_leaf=is_shape,
    )
    return [jax.tree.map(lambda leaf: jnp.asarray(leaf[time], dtype), tree) for time in range(5)]  # noqa: B023


@pytest.fixture(scope="module")
def params() -> Any:
    template = jax.eval_shape(lambda key: NiNo.init(key, width=WIDTH).params, jax.random.key(0))
    return random_leaves(template, seed=0)


@functools.partial(jax.jit, static_argnames=("chunk_size",))
def predict(params: Any, history: Any, horizon: Any = 5, chunk_size: int | None = None) -> Any:
    return NiNo(params, chunk_size=chunk_size)(history, wnn_jax.default_roles(history[0]), horizon)


def by_reference(params: Any, history: list[Any], horizon: int, description: Any = None) -> Any:
    """The forecast by the paper's equations, edge by edge."""
    graph = graph_of(history[0], description)
    leaves = list(zip(*map(jax.tree.leaves, history), strict=True))
    features, ends, kinds, scales = [], [], [], []
    for piece, kind, block_ends in graph.blocks:
        exact = np.stack([np.asarray(snapshot, np.float64) for snapshot in leaves[piece.leaf]])
        mean, std = exact.mean(), exact.std(ddof=1)
        scales.append((mean, std))
        matrices = np.stack([piece.tensor.to_matrix(piece.of(snapshot)) for snapshot in exact], axis=-1)
        window, size = matrices.shape[:2]
        for begin in range(0, window, 9):
            cut = (matrices[begin : begin + 9] - mean) / (std + 1e-6)
            padded = np.zeros([size, 9, 5])
            padded[:, : len(cut)] = np.moveaxis(cut, 1, 0)
            features.append(padded.reshape(size, 45))
            ends.append(np.stack(block_ends.at(np.arange(size), np)))
            kinds.append(np.full(size, kind))
    others = np.zeros([len(graph.kinds), 9, 5])
    others[:, 0] = np.where(graph.kinds == KINDS["self"], 2, 1)[:, None]
    sources, targets = np.concatenate([*ends, np.stack([graph.sources, graph.targets])], axis=1)
    outputs = reference.nino(
        np.concatenate([*features, others.reshape(-1, 45)]),
        np.concatenate([*kinds, graph.kinds]),
        sources,
        targets,
        graph.positions.astype(np.float64),
        params,
    )[:, horizon - 1]
    forecast, start = [leaf[-1] for leaf in leaves], 0
    remaining = iter(features)
    for (piece, _, _), (mean, std) in zip(graph.blocks, scales, strict=True):
        cuts = []
        for cut in piece.tensor.cuts:
            feature, size = next(remaining).reshape(-1, 9, 5), cut.stop - cut.start
            change = outputs[start : start + len(feature), :size]
            cuts.append((feature[:, :size, -1] + change) * std + mean)
            start += len(feature)
        new = piece.tensor.from_matrix(jnp.asarray(np.concatenate(cuts, axis=1).T))
        forecast[piece.leaf] = piece.put(forecast[piece.leaf], new)
    return jax.tree.unflatten(jax.tree.structure(history[0]), forecast)


# Against the equations


@pytest.mark.parametrize(
    ("num_rounds", "horizon"), [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 40), (3, 5)))]
)
def test_agrees_with_the_reference(num_rounds: int, horizon: int):
    params = random_leaves(NiNo.init(jax.random.key(0), width=WIDTH, num_rounds=num_rounds).params, seed=0)
    with jax.enable_x64(True):
        expected = by_reference(params, walk(dtype=jnp.float64), horizon)
    predicted = predict(params, walk(), horizon)
    jax.tree.map(assert_close, predicted, expected)
    moved = jax.tree.map(lambda new, last: np.abs(new - last).max() > 1e-3, predicted, walk()[-1])
    assert all(jax.tree.leaves(moved))


def test_agrees_with_the_reference_on_large_windows(params: Any):
    """Of 16 and of 25 elements, cut into 2 and into 3 edges, some of the size of other windows."""
    shapes = {
        "Conv_0": {"kernel": (4, 4, 2, 3), "bias": (3,)},
        "Conv_1": {"kernel": (3, 3, 3, 4)},
        "Conv_2": {"kernel": (5, 5, 4, 2)},
    }
    with jax.enable_x64(True):
        expected = by_reference(params, walk(shapes, dtype=jnp.float64), 5)
    jax.tree.map(assert_close, predict(params, walk(shapes)), expected)
    jax.tree.map(assert_close, predict(params, walk(shapes), chunk_size=5), expected)


ATTENTION = {
    "wte": {"embedding": (7, 4)},
    "wpe": {"embedding": (6, 4)},
    "attention": {
        **{name: {"kernel": (4, 4), "bias": (4,)} for name in ("query", "key", "value")},
        "out": {"kernel": (4, 4), "bias": (4,)},
    },
    "Dense_0": {"kernel": (4, 8)},
    "Dense_1": {"kernel": (8, 4)},
    "Dense_2": {"kernel": (4, 7)},
    **{f"LayerNorm_{i}": {"scale": (4,), "bias": (4,)} for i in range(3)},
}


def fused(separate: Any) -> Any:
    """The same with queries, keys and values in one layer."""
    attention = separate["attention"]
    parts = [attention[name] for name in ("query", "key", "value")]
    joined = {name: jnp.concatenate([part[name] for part in parts], axis=-1) for name in ("kernel", "bias")}
    return {**separate, "attention": {"qkv": joined, "out": attention["out"]}}


def test_queries_keys_and_values_in_one_leaf(params: Any, tmp_path: Path):
    """Each is a tensor of its own in the graph, with the scale of the leaf."""
    with jax.enable_x64(True):
        exact = walk(ATTENTION, dtype=jnp.float64)
        joined = list(map(fused, exact))
        description = neural_graph(joined[0], num_heads=2)
        num_nodes = len(graph_of(joined[0], description).degrees)
        description["positions"] = np.random.default_rng(0).normal(size=(num_nodes, 8)).astype(np.float32)
        expected = by_reference(params, joined, 7, description)
    history = list(map(fused, walk(ATTENTION)))
    nowcaster = NiNo(params, graph=description, default_horizon=7)
    description["edges"].clear()  # The nowcaster has a copy.
    wnn_jax.save(nowcaster, tmp_path / "nino.npz")
    loaded = wnn_jax.load(tmp_path / "nino.npz")
    assert isinstance(loaded, NiNo)
    assert (loaded.graph, loaded.default_horizon) == (nowcaster.graph, 7)
    roles = wnn_jax.default_roles(history[0])
    predicted = jax.jit(lambda history: loaded(history, roles))(history)
    jax.tree.map(assert_close, predicted, expected)


# Against the published code


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return published_arrays("nino_golden.npz")


@pytest.fixture(scope="module")
def published() -> NiNo:
    pytest.importorskip("torch")
    return wnn_jax.convert.nino(published_file("nino_no_posw.pt"))


PUBLISHED_NAMES = {"Conv_0": "fc.0", "Conv_1": "fc.2", "Conv_2": "fc.4", "Dense_0": "fc.8"}


def golden_tree(golden: dict[str, np.ndarray], prefix: str, time: int | None = None) -> Any:
    """Weights of the golden file, whose layout is PyTorch's, as Flax has them."""

    def read(name: str) -> jax.Array:
        array = golden[f"{prefix}/{name}"]
        array = array if time is None else array[..., time]
        return jnp.asarray(array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array)

    return {
        ours: {"kernel": read(f"{theirs}.weight"), "bias": read(f"{theirs}.bias")}
        for ours, theirs in PUBLISHED_NAMES.items()
    }


@pytest.fixture(scope="module")
def golden_history(golden: dict[str, np.ndarray]) -> list[Any]:
    return [golden_tree(golden, "history", time) for time in range(5)]


@pytest.mark.parametrize("horizon", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 10)), 40])
def test_predictions_of_the_published_code(
    golden: dict[str, np.ndarray], golden_history: list[Any], published: NiNo, horizon: int
):
    given = {**neural_graph(golden_history[0]), "positions": golden["nino/lpe"]}
    nowcaster, roles = NiNo(published.params, graph=given), wnn_jax.default_roles(golden_history[0])
    predicted = jax.jit(lambda history: nowcaster(history, roles, horizon))(golden_history)
    jax.tree.map(assert_close, predicted, golden_tree(golden, f"nino_no_posw/k{horizon}"))


def test_the_graph_of_the_published_code(golden: dict[str, np.ndarray], golden_history: list[Any]):
    """It is the same, numbers and all, and so are the eigenvectors of simple eigenvalues, but for signs."""
    graph = graph_of(golden_history[0])
    ours = np.array(edges_of(graph, golden_history[0])).T
    theirs = np.stack([*golden["nino/edge_index"], golden["nino/edge_type"]])
    np.testing.assert_array_equal(ours[:, np.lexsort(ours)], theirs[:, np.lexsort(theirs)])
    simple = golden["nino/lpe"][:, :3]
    signs = np.sign(np.sum(simple * graph.positions[:, :3], axis=0, keepdims=True))
    np.testing.assert_allclose(graph.positions[:, :3] * signs, simple, atol=1e-6)


# What shapes, sizes and precision change: nothing


@pytest.mark.parametrize("chunk_size", [7, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 40))])
def test_chunks_change_nothing(params: Any, chunk_size: int):
    # Sums come in another order.
    assert_trees_close(predict(params, walk(), 5, chunk_size), predict(params, walk()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_are_forecast_in_float32(params: Any, dtype: Any):
    """Beside leaves of float32."""
    history = walk(dtype=dtype)
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in history]
    expected = {**jax.tree.map(lambda leaf: leaf.astype(dtype), predict(params, wide))}
    mixed = [{**tree, "Dense_0": wide_tree["Dense_0"]} for tree, wide_tree in zip(history, wide, strict=True)]
    expected["Dense_0"] = predict(params, wide)["Dense_0"]
    assert_trees_close(predict(params, mixed), expected, rtol=1e-2, atol=1e-2)


def test_what_is_not_finite_comes_back_as_it_was(params: Any):
    history = walk()
    history[-1]["Dense_0"]["bias"] = history[-1]["Dense_0"]["bias"].at[0].set(jnp.inf)
    predicted = predict(params, history)
    assert np.isinf(predicted["Dense_0"]["bias"][0])


@pytest.mark.slow
def test_a_batch_of_models(params: Any):
    histories = [walk(seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *histories)
    batched = jax.vmap(lambda history: predict(params, history))(stacked)
    for index, history in enumerate(histories):
        one = jax.tree.map(lambda leaf: leaf[index], batched)  # noqa: B023
        assert_trees_close(one, predict(params, history), rtol=1e-5, atol=1e-5)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters(params: Any, axis_type: AxisType):
    shapes = {"Dense_0": {"kernel": (8, 16), "bias": (16,)}, "Dense_1": {"kernel": (16, 4), "bias": (4,)}}
    history = walk(shapes)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = jax.tree.map(lambda shape: PartitionSpec("data", "model")[: len(shape)], shapes, is_leaf=is_shape)
    specs = jax.tree.map(lambda spec: PartitionSpec(*spec), specs, is_leaf=lambda node: isinstance(node, tuple))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        sharded = [jax.device_put(snapshot, shardings) for snapshot in history]
        predicted = jax.jit(predict, out_shardings=shardings if axis_type == AxisType.Auto else None)(params, sharded)
        equal = jax.tree.map(lambda leaf, other: leaf.sharding.is_equivalent_to(other, leaf.ndim), predicted, shardings)
        assert all(jax.tree.leaves(equal))
    assert_trees_close(predicted, predict(params, history), rtol=1e-5, atol=1e-5)


def test_matrix_products_are_precise(params: Any):
    nowcaster, roles = NiNo(params), wnn_jax.default_roles(walk()[0])
    assert_dots_are_precise(lambda history: nowcaster(history, roles), walk())


def lower(params: Any, model: Any, chunk_size: int | None = None) -> jax.stages.Lowered:
    """The forecast of a model of which only shapes are known."""
    roles = wnn_jax.default_roles(model)
    return jax.jit(lambda history: NiNo(params, chunk_size=chunk_size)(history, roles)).lower([model] * 5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [(), (3, 3)])
def test_working_memory_is_bounded_by_the_chunk(params: Any, window: tuple[int, ...]):
    """Four times as many weights between as many neurons, in the same chunks."""

    def temporaries(width: int) -> int:
        kernel = jax.ShapeDtypeStruct((*window, width, width), jnp.float32)
        compiled = lower(params, {"conv" if window else "fc": {"kernel": kernel}}, 256).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes - 4 * kernel.size

    assert temporaries(400) - temporaries(200) < 2_000 * 400


def test_compilation_is_of_the_network_and_of_little_for_every_leaf(params: Any):
    def lines_and_products(num_layers: int) -> tuple[int, int]:
        shapes = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
        text = lower(params, {f"linear{index}": shapes for index in range(num_layers)}).as_text()
        return text.count("\n"), text.count("stablehlo.dot_general")

    (lines, products), (more_lines, same) = map(lines_and_products, (5, 25))
    assert 0 < products == same
    assert (more_lines - lines) / 40 < 25


# As a nowcaster


def test_what_cannot_be_read_is_refused_when_the_state_is_initialised(params: Any):
    tx = wnn_jax.nowcast(NiNo(params), snapshot_every=1)
    model = {"decoder": {"kernel": jnp.zeros((4, 8))}, "encoder": {"kernel": jnp.zeros((8, 4))}}
    with pytest.raises(ValueError, match=r"the leaf 'decoder/kernel' of shape \(4, 8\): no builder knows"):
        tx.init(model)
    edges = {"encoder/kernel": ["input", "code"], "decoder/kernel": ["code", "output"]}
    given = NiNo(params, graph={"edges": edges})
    wnn_jax.nowcast(given, snapshot_every=1).init(model)
    with pytest.raises(ValueError, match="graph is of another model: it has no edges for the leaf 'BatchNorm_0/bias'"):
        wnn_jax.nowcast(given, snapshot_every=1).init(walk()[0])


def test_it_jumps_in_a_training_of_masked_parameters(params: Any):
    """It forecasts the part of a model that it is given."""
    mask = {name: name.startswith("Dense") for name in SHAPES}
    tx = optax.masked(wnn_jax.nowcast(NiNo(params), snapshot_every=1), mask)
    steps = train(optax.chain(optax.sgd(0.1), tx), walk()[0], 5, gradient=pull_to_one)
    plain = [step.params for step in train(optax.sgd(0.1), walk()[0], 5, gradient=pull_to_one)]
    window = [{"Dense_0": tree["Dense_0"]} for tree in plain]
    expected = plain[-1] | bounded(predict(params, window), window, 5)
    assert_trees_close(steps[3].params, plain[3])
    assert_trees_close(steps[4].params, expected, rtol=1e-4, atol=1e-4)
    assert int(optax.tree.get(steps[4].state, "num_nowcasts")) == 1


@pytest.mark.parametrize("horizon", [0, 41, 2.5])
def test_arguments_that_it_cannot_use(params: Any, horizon: Any):
    with pytest.raises(ValueError, match=f"horizon={horizon}"):
        NiNo(params)(walk(), wnn_jax.default_roles(walk()[0]), horizon)
    with pytest.raises(ValueError, match="history has 4 snapshots but this nowcaster has context=5"):
        NiNo(params)(walk()[:4], wnn_jax.default_roles(walk()[0]))
    assert NiNo(params)([{}] * 5, {}) == {}


@pytest.mark.parametrize("change", [{"hidden": {}}, {"rounds": {}}, {"more": {"kernel": np.zeros(3)}}])
def test_parameters_of_another_network(params: Any, change: Any):
    with pytest.raises(ValueError, match="params are not the parameters of a NiNo"):
        NiNo({**params, **change})
