import sys
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from wnn_jax.convert import keras_wnn
from wnn_jax.nowcasters import WNN

STREAM = {
    "expand": (None, 64),
    "squeeze": (64, 8),
    "offset": (8, 64),
    "gain": (8, 64),
    "exponent": (8, 64),
    "project": (64, 32),
}
ARGUMENTS = ("conv", "dense", "bias")


def published_layers() -> list[tuple[tuple[str, ...], tuple[int, int]]]:
    """Where each layer belongs, and the shape of its kernel, in the order in which the published code makes them."""
    layers = [
        ((stream, layer), (shape[0] or num_inputs, shape[1]))
        for stream, num_inputs in (("values", 5), ("differences", 4))
        for layer, shape in STREAM.items()
    ]
    return [*layers, (("output",), (64, 1))]


def write_layer(file: h5py.File, name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
    file[f"{name}/{name}/kernel:0"] = kernel
    file[f"{name}/{name}/bias:0"] = bias


def write_published(path: Path, *, start: int = 14, seed: int = 0) -> dict[str, Any]:
    """Write a file as Keras does, with other groups between the layers, and return the network in it."""
    rng = np.random.default_rng(seed)
    network: dict[str, Any] = {}
    with h5py.File(path, "w") as file:
        for name in ("add_3", "concatenate_2", "input_3", "lambda_3", "leaky_re_lu_3", "multiply_5"):
            file.create_group(name)
        for number, (place, shape) in enumerate(published_layers(), start):
            kernel = rng.normal(size=shape).astype(np.float32)
            bias = rng.normal(size=shape[1]).astype(np.float32)
            write_layer(file, f"dense_{number}" if number else "dense", kernel, bias)
            parent = network if len(place) == 1 else network.setdefault(place[0], {})
            parent[place[-1]] = {"kernel": kernel, "bias": bias}
    return network


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Any]:
    paths = {argument: tmp_path / f"{argument}.h5" for argument in ARGUMENTS}
    for seed, path in enumerate(paths.values()):
        write_published(path, seed=seed)
    return paths


# Keras counts the layers of a session; read as words, dense_10 comes before dense_9.
@pytest.mark.parametrize("start", [0, 1, 9, 995])
def test_every_array_lands_in_its_place(tmp_path: Path, start: int):
    paths = [tmp_path / f"{argument}.h5" for argument in ARGUMENTS]
    networks = [write_published(path, start=start + 13 * seed, seed=seed) for seed, path in enumerate(paths)]
    converted = keras_wnn(*paths)
    assert isinstance(converted, WNN)
    jax.tree.map(np.testing.assert_array_equal, dict(converted.params), dict(zip(ARGUMENTS, networks, strict=True)))


def test_settings(paths: dict[str, Any]):
    assert not keras_wnn(**paths).published_bias
    converted = keras_wnn(*map(str, paths.values()), published_bias=True)
    assert converted.published_bias
    assert "Jang" in converted.record["source"]


# Every error names the argument and the file.


def test_a_missing_file(paths: dict[str, Any]):
    paths["dense"].unlink()
    with pytest.raises(FileNotFoundError, match=f"dense='{paths['dense']}' does not exist"):
        keras_wnn(**paths)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, how: Any) -> None:
    with h5py.File(path, "a") as file:
        how(file)


def swap_first_and_last(file: h5py.File) -> None:
    file.move("dense_14", "first")
    file.move("dense_26", "dense_14")
    file.move("dense_14/dense_26", "dense_14/dense_14")
    file.move("first", "dense_26")
    file.move("dense_26/dense_14", "dense_26/dense_26")


def narrow(file: h5py.File) -> None:
    del file["dense_19"]
    write_layer(file, "dense_19", np.zeros((64, 16)), np.zeros(16))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "is not an HDF5 file"),
        (lambda path: path.write_bytes(b"PK no HDF5"), "is not an HDF5 file"),
        (cut_in_half, "is not an HDF5 file, or a damaged one"),
        (lambda path: change(path, lambda file: file.pop("dense_20")), "has 12 dense layers .* has 13"),
        (
            lambda path: change(path, lambda file: write_layer(file, "dense_27", np.zeros((1, 1)), np.zeros(1))),
            "has 14 dense layers .* has 13",
        ),
        (lambda path: change(path, narrow), "is not a weight file of the published WNN: .*16"),
        (lambda path: change(path, swap_first_and_last), "is not a weight file of the published WNN"),
        *(
            (lambda path, x=x: change(path, lambda file: file.pop(f"dense_14/dense_14/{x}:0")), f"has no {x} in")
            for x in ("kernel", "bias")
        ),
    ],
)
def test_a_file_of_something_else(paths: dict[str, Any], damage: Any, reason: str):
    damage(paths["dense"])
    with pytest.raises(ValueError, match=f"dense='{paths['dense']}' {reason}"):
        keras_wnn(**paths)


def test_without_h5py_the_error_says_how_to_install_it(paths: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"keras_wnn needs h5py; install it with: pip install 'wnn-jax\[convert\]'"):
        keras_wnn(**paths)
