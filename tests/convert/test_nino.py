import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wnn_jax._roles import ROLES
from wnn_jax.convert import nino, nino_mlp
from wnn_jax.nowcasters import NiNo, WNNPlus

WIDTH = 16
MLP_LAYERS = {
    "edge_proj.fc.0": (WIDTH, 5),
    **{f"edge_mlp.fc.{2 * index}": (WIDTH, WIDTH) for index in range(3)},
    "edge_mlp.fc.6": (40, WIDTH),
}
ROUND_LAYERS = {
    "edge_encoder": (2 * WIDTH, WIDTH),
    "pre_nns.0.0": (WIDTH, 2 * WIDTH),
    "post_nns.0.0": (WIDTH, 2 * WIDTH),
    "lin": (WIDTH, WIDTH),
}
EDGE_LAYERS = ("lin_e", "lin_s", "lin_t", "lin1")


def nino_layers(num_rounds: int) -> dict[str, tuple[int, int]]:
    layers = {"node_proj.fc.0": (WIDTH, 8), "edge_proj.fc.0": (WIDTH, 45)}
    layers |= {"edge_out.fc.0": (WIDTH, WIDTH), "edge_out.fc.2": (360, WIDTH)}
    for level in range(num_rounds + 1):
        layers |= {f"gnn.convs.{level}.{name}": shape for name, shape in ROUND_LAYERS.items()}
    for level in range(num_rounds):
        layers |= {f"gnn.edge_update.{level}.{name}": (WIDTH, WIDTH) for name in EDGE_LAYERS}
    return layers


def random_state(layers: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"layer_embed.weight": (15, WIDTH)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "published.pt"


@pytest.fixture(params=["WNN+", "NiNo"])
def network(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, np.ndarray]]:
    """Its name, its reader, and what a file of it holds."""
    if request.param == "NiNo":
        return "NiNo", nino, random_state(nino_layers(2))
    return r"WNN\+", nino_mlp, random_state(MLP_LAYERS)


def write(torch: Any, path: Path, state: dict[str, np.ndarray]) -> None:
    """Write a file like the published ones."""
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"state_dict": tensors, "model_args": {"gnn": False, "hid": WIDTH}}, path)


def assert_layers(layers: Any, state: dict[str, np.ndarray], names: dict[str, str]) -> None:
    for ours, theirs in names.items():
        np.testing.assert_array_equal(layers[ours]["kernel"], state[f"{theirs}.weight"].T)
        np.testing.assert_array_equal(layers[ours]["bias"], state[f"{theirs}.bias"])


def test_every_array_of_wnn_plus_lands_in_its_place(torch: Any, path: Path):
    state = random_state(MLP_LAYERS)
    write(torch, path, state)
    converted = nino_mlp(str(path))
    path.unlink()
    assert isinstance(converted, WNNPlus)
    layers = {"expand": "edge_proj.fc.0", "output": "edge_mlp.fc.6"}
    layers |= {f"hidden_{index}": f"edge_mlp.fc.{2 * index}" for index in range(3)}
    assert set(converted.params) == {*layers, "role"}
    assert_layers(converted.params, state, layers)
    published = {"dense": 1, "bias": 2, "conv": 3, "norm": 4, "embedding": 5}
    rows = [published[role] for role in ROLES]
    np.testing.assert_array_equal(converted.params["role"]["embedding"], state["layer_embed.weight"][rows])
    assert "Knyazev" in converted.record["source"]


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_every_array_of_nino_lands_in_its_place(torch: Any, path: Path, num_rounds: int):
    state = random_state(nino_layers(num_rounds))
    write(torch, path, state)
    converted = nino(path)
    assert isinstance(converted, NiNo)
    assert "Knyazev" in converted.record["source"]
    params: Any = converted.params
    np.testing.assert_array_equal(params["kind"]["embedding"], state["layer_embed.weight"])
    layers = {"position": "node_proj.fc.0", "weights": "edge_proj.fc.0", "hidden": "edge_out.fc.0"}
    assert_layers(params, state, layers)
    assert sorted(params["rounds"]) == [str(level) for level in range(num_rounds)]
    for level, one_round in params["rounds"].items():
        nodes = zip(("modulation", "message", "node", "mix"), ROUND_LAYERS, strict=True)
        assert_layers(one_round, state, {ours: f"gnn.convs.{level}.{theirs}" for ours, theirs in nodes})
        edges = zip(("edge", "source", "target", "output"), EDGE_LAYERS, strict=True)
        assert_layers(one_round["edge"], state, {ours: f"gnn.edge_update.{level}.{theirs}" for ours, theirs in edges})
    # Element 3 of a window, 7 snapshots ahead.
    np.testing.assert_array_equal(params["output"]["kernel"][:, 6, 3], state["edge_out.fc.2.weight"][3 * 40 + 6])
    assert params["output"]["bias"][6, 3] == state["edge_out.fc.2.bias"][3 * 40 + 6]


def test_numbers_of_lower_precision(torch: Any, path: Path):
    state = random_state(MLP_LAYERS)
    torch.save({"state_dict": {name: torch.from_numpy(array).bfloat16() for name, array in state.items()}}, path)
    kernel: Any = nino_mlp(path).params["hidden_0"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, state["edge_mlp.fc.0.weight"].T, rtol=2**-8)


# Every error names the file.


class Exploding:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("content", [{}, {"state_dict": None}, {"state_dict": {"step": 3}}, Exploding()])
def test_a_file_without_a_state_dict_of_tensors(torch: Any, path: Path, content: Any):
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file with a `state_dict`"):
        nino_mlp(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02garbage", 0.5, 0.99])
def test_a_file_of_another_format_or_a_part_of_one(torch: Any, network: Any, path: Path, content: bytes | float):
    _, read, state = network
    with pytest.raises(FileNotFoundError, match=f"path='{path}' does not exist"):
        read(path)
    write(torch, path, state)
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file"):
        read(path)


@pytest.mark.parametrize("shape", [None, (), (3,), (3, 7), (2, 3, 4)], ids=str)
def test_a_tensor_that_is_missing_or_of_another_shape(torch: Any, network: Any, path: Path, shape: Any):
    name, read, state = network
    for tensor in state:
        if tensor.startswith("gnn.convs.2"):  # The last round of nodes, which is not read.
            continue
        changed = {other: array for other, array in state.items() if other != tensor}
        write(torch, path, changed if shape is None else changed | {tensor: np.ones(shape, np.float32)})
        with pytest.raises(ValueError, match=f"path='{path}' is not a weight file of the published {name}"):
            read(path)


def test_a_network_of_more_layers(torch: Any, network: Any, path: Path):
    name, read, state = network
    write(torch, path, state | {"gnn.norms.0.weight": np.ones([WIDTH, WIDTH], np.float32)})
    expected = f"not a weight file of the published {name}.*it has 'gnn.norms.0.weight'"
    with pytest.raises(ValueError, match=expected):
        read(path)


def test_numbers_that_are_not_finite(torch: Any, network: Any, path: Path):
    _, read, state = network
    state["layer_embed.weight"][3] = np.nan
    write(torch, path, state)
    with pytest.raises(ValueError, match=f"path='{path}' has numbers that are not finite in 'layer_embed.weight'"):
        read(path)


def test_a_file_of_another_network(torch: Any, path: Path):
    write(torch, path, random_state(MLP_LAYERS))
    with pytest.raises(ValueError, match=rf"path='{path}' is a weight file of the published WNN\+.*with nino_mlp"):
        nino(path)
    state = random_state(nino_layers(2))
    write(torch, path, state)
    with pytest.raises(ValueError, match=rf"path='{path}' is not a weight file of the published WNN\+"):
        nino_mlp(path)
    write(torch, path, {**state, "wte_pos_enc_layer.weight": np.zeros([9, WIDTH], np.float32)})
    with pytest.raises(ValueError, match=f"path='{path}' is of a NiNo with an embedding for every token.*nino_no_posw"):
        nino(path)


def test_without_torch_the_error_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"nino and nino_mlp need PyTorch; .* pip install 'wnn-jax\[convert\]'"):
        nino_mlp(path)
