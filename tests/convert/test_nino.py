import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wnn_jax._roles import ROLES
from wnn_jax.convert import nino, nino_mlp
from wnn_jax.nowcasters import NiNo, WNNPlus

WIDTH = 16
SHAPES = {
    "layer_embed.weight": (15, WIDTH),
    "edge_proj.fc.0.weight": (WIDTH, 5),
    "edge_proj.fc.0.bias": (WIDTH,),
    "edge_mlp.fc.0.weight": (WIDTH, WIDTH),
    "edge_mlp.fc.0.bias": (WIDTH,),
    "edge_mlp.fc.2.weight": (WIDTH, WIDTH),
    "edge_mlp.fc.2.bias": (WIDTH,),
    "edge_mlp.fc.4.weight": (WIDTH, WIDTH),
    "edge_mlp.fc.4.bias": (WIDTH,),
    "edge_mlp.fc.6.weight": (40, WIDTH),
    "edge_mlp.fc.6.bias": (40,),
}
LAYERS = {"expand": "edge_proj.fc.0", "output": "edge_mlp.fc.6"} | {
    f"hidden_{index}": f"edge_mlp.fc.{2 * index}" for index in range(3)
}


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nino_mlp.pt"


def write(torch: Any, path: Path, state: dict[str, np.ndarray]) -> None:
    """Writes a file as the published ones are."""
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"state_dict": tensors, "model_args": {"gnn": False, "hid": WIDTH}}, path)


@pytest.mark.parametrize("as_argument", [str, Path], ids=["str", "Path"])
def test_every_array_lands_in_its_place(torch: Any, state: dict[str, np.ndarray], path: Path, as_argument: Any):
    write(torch, path, state)
    converted = nino_mlp(as_argument(path))
    path.unlink()
    assert isinstance(converted, WNNPlus)
    assert set(converted.params) == {*LAYERS, "role"}
    for ours, theirs in LAYERS.items():
        np.testing.assert_array_equal(converted.params[ours]["kernel"], state[f"{theirs}.weight"].T)
        np.testing.assert_array_equal(converted.params[ours]["bias"], state[f"{theirs}.bias"])
    assert "Knyazev" in converted.record["source"]


def test_published_kinds_of_layer_become_roles(torch: Any, state: dict[str, np.ndarray], path: Path):
    write(torch, path, state)
    embedding = nino_mlp(path).params["role"]["embedding"]
    published = {"dense": 1, "bias": 2, "conv": 3, "norm": 4, "embedding": 5}
    for row, role in zip(embedding, ROLES, strict=True):
        np.testing.assert_array_equal(row, state["layer_embed.weight"][published[role]])


# Every error names the file.


def test_a_missing_file(torch: Any, path: Path):
    with pytest.raises(FileNotFoundError, match=f"path='{path}' does not exist"):
        nino_mlp(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02garbage", b"text", bytes(1000)])
def test_a_file_of_another_format(torch: Any, path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file"):
        nino_mlp(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(torch: Any, state: dict[str, np.ndarray], path: Path, share: float):
    write(torch, path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file"):
        nino_mlp(path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"state_dict": None}, {"state_dict": {"step": 3}}], ids=str)
def test_a_file_without_a_state_dict_of_tensors(torch: Any, path: Path, content: Any):
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file with a `state_dict`"):
        nino_mlp(path)


class Exploding:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def test_pickled_objects_are_never_loaded(torch: Any, path: Path):
    torch.save({"state_dict": Exploding()}, path)
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file"):
        nino_mlp(path)


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor(torch: Any, state: dict[str, np.ndarray], path: Path, name: str):
    del state[name]
    write(torch, path, state)
    with pytest.raises(ValueError, match=f"path='{path}' is not a weight file of the published WNN.*{name}"):
        nino_mlp(path)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", [(), (3,), (3, 7), (2, 3, 4)], ids=str)
def test_a_tensor_of_another_shape(
    torch: Any, state: dict[str, np.ndarray], path: Path, name: str, shape: tuple[int, ...]
):
    write(torch, path, state | {name: np.ones(shape, np.float32)})
    with pytest.raises(ValueError, match=f"path='{path}' is not a weight file of the published WNN"):
        nino_mlp(path)


def test_a_network_of_more_layers(torch: Any, state: dict[str, np.ndarray], path: Path):
    write(torch, path, state | {"edge_mlp.fc.8.weight": np.ones([40, 40], np.float32)})
    with pytest.raises(ValueError, match=r"not a weight file of the published WNN.*it has 'edge_mlp\.fc\.8\.weight'"):
        nino_mlp(path)


def test_numbers_that_are_not_finite(torch: Any, state: dict[str, np.ndarray], path: Path):
    state["edge_mlp.fc.2.bias"][3] = np.nan
    write(torch, path, state)
    with pytest.raises(ValueError, match=f"path='{path}' has numbers that are not finite in 'edge_mlp.fc.2.bias'"):
        nino_mlp(path)


def test_numbers_of_lower_precision(torch: Any, state: dict[str, np.ndarray], path: Path):
    torch.save({"state_dict": {name: torch.from_numpy(array).bfloat16() for name, array in state.items()}}, path)
    kernel: Any = nino_mlp(path).params["hidden_0"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(kernel, state["edge_mlp.fc.0.weight"].T, rtol=2**-8)


def test_without_torch_the_error_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError, match=r"nino and nino_mlp need PyTorch; install it with: pip install 'wnn-jax\[convert\]'"
    ):
        nino_mlp(path)


# NiNo

NUM_ROUNDS = 2
DENSE = {
    "node_proj.fc.0": (WIDTH, 8),
    "edge_proj.fc.0": (WIDTH, 45),
    "edge_out.fc.0": (WIDTH, WIDTH),
    "edge_out.fc.2": (360, WIDTH),
    **{
        f"gnn.convs.{level}.{name}": shape
        for level in range(NUM_ROUNDS + 1)
        for name, shape in {
            "edge_encoder": (2 * WIDTH, WIDTH),
            "pre_nns.0.0": (WIDTH, 2 * WIDTH),
            "post_nns.0.0": (WIDTH, 2 * WIDTH),
            "lin": (WIDTH, WIDTH),
        }.items()
    },
    **{
        f"gnn.edge_update.{level}.{name}": (WIDTH, WIDTH)
        for level in range(NUM_ROUNDS)
        for name in ("lin_e", "lin_s", "lin_t", "lin1")
    },
}


@pytest.fixture
def nino_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"layer_embed.weight": (15, WIDTH)}
    for name, shape in DENSE.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_array_of_nino_lands_in_its_place(torch: Any, nino_state: dict[str, np.ndarray], path: Path):
    write(torch, path, nino_state)
    converted = nino(path)
    assert isinstance(converted, NiNo)
    assert "Knyazev" in converted.record["source"]
    params: Any = converted.params
    np.testing.assert_array_equal(params["kind"]["embedding"], nino_state["layer_embed.weight"])
    one_round = params["rounds"]["1"]
    for layer, theirs in (
        (params["position"], "node_proj.fc.0"),
        (params["weights"], "edge_proj.fc.0"),
        (params["hidden"], "edge_out.fc.0"),
        (one_round["modulation"], "gnn.convs.1.edge_encoder"),
        (one_round["message"], "gnn.convs.1.pre_nns.0.0"),
        (one_round["node"], "gnn.convs.1.post_nns.0.0"),
        (one_round["mix"], "gnn.convs.1.lin"),
        (one_round["edge"]["edge"], "gnn.edge_update.1.lin_e"),
        (one_round["edge"]["source"], "gnn.edge_update.1.lin_s"),
        (one_round["edge"]["target"], "gnn.edge_update.1.lin_t"),
        (one_round["edge"]["output"], "gnn.edge_update.1.lin1"),
    ):
        np.testing.assert_array_equal(layer["kernel"], nino_state[f"{theirs}.weight"].T)
        np.testing.assert_array_equal(layer["bias"], nino_state[f"{theirs}.bias"])
    # Element 3 of a window, 7 snapshots ahead.
    np.testing.assert_array_equal(params["output"]["kernel"][:, 6, 3], nino_state["edge_out.fc.2.weight"][3 * 40 + 6])
    assert params["output"]["bias"][6, 3] == nino_state["edge_out.fc.2.bias"][3 * 40 + 6]


@pytest.mark.parametrize("number", [1, 3])
def test_any_number_of_rounds(torch: Any, nino_state: dict[str, np.ndarray], path: Path, number: int):
    others = {
        name: array for name, array in nino_state.items() if not name.startswith(("gnn.convs.", "gnn.edge_update."))
    }
    first = {
        name: array for name, array in nino_state.items() if name.startswith(("gnn.convs.0.", "gnn.edge_update.0."))
    }
    of_rounds = {
        re.sub(r"\.0\.", f".{level}.", name, count=1): array for level in range(number) for name, array in first.items()
    }
    write(torch, path, {**others, **of_rounds})
    assert sorted(nino(path).params["rounds"]) == [str(level) for level in range(number)]


@pytest.mark.parametrize(
    "more", ["edge_proj.fc.2", "node_proj.fc.2", "edge_out.fc.4", "gnn.convs.0.pre_nns.0.2", "gnn.norms.0"]
)
def test_a_nino_of_more_layers(torch: Any, nino_state: dict[str, np.ndarray], path: Path, more: str):
    write(torch, path, nino_state | {f"{more}.weight": np.ones([WIDTH, WIDTH], np.float32)})
    with pytest.raises(ValueError, match=f"not a weight file of the published NiNo.*it has '{more}.weight'"):
        nino(path)


def test_a_file_of_the_other_network(
    torch: Any, state: dict[str, np.ndarray], nino_state: dict[str, np.ndarray], path: Path
):
    write(torch, path, state)
    with pytest.raises(
        ValueError, match=rf"path='{path}' is a weight file of the published WNN\+.*read it with nino_mlp"
    ):
        nino(path)
    write(torch, path, nino_state)
    with pytest.raises(ValueError, match=rf"path='{path}' is not a weight file of the published WNN\+"):
        nino_mlp(path)


def test_a_nino_that_knows_the_tokens(torch: Any, nino_state: dict[str, np.ndarray], path: Path):
    write(torch, path, {**nino_state, "wte_pos_enc_layer.weight": np.zeros([9, WIDTH], np.float32)})
    with pytest.raises(ValueError, match=f"path='{path}' is of a NiNo with an embedding for every token.*nino_no_posw"):
        nino(path)


@pytest.mark.parametrize("name", ["layer_embed.weight", *(f"{name}.weight" for name in DENSE if ".2" not in name)])
@pytest.mark.parametrize("shape", [None, (3,), (3, 7)], ids=str)
def test_a_tensor_of_nino_that_is_missing_or_of_another_shape(
    torch: Any, nino_state: dict[str, np.ndarray], path: Path, name: str, shape: tuple[int, ...] | None
):
    del nino_state[name]
    if shape is not None:
        nino_state[name] = np.ones(shape, np.float32)
    write(torch, path, nino_state)
    with pytest.raises(ValueError, match=f"path='{path}' is not a weight file of the published NiNo"):
        nino(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"text"])
def test_no_nino_in_a_file_of_another_format(torch: Any, path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"path='{path}' cannot be read as a PyTorch file"):
        nino(path)
