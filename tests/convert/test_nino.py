import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wnn_jax._roles import ROLES
from wnn_jax.convert import nino_mlp
from wnn_jax.nowcasters import WNNPlus

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


def test_without_torch_the_error_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"nino_mlp needs PyTorch; install it with: pip install 'wnn-jax\[convert\]'"):
        nino_mlp(path)
