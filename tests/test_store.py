import json
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from wnn_jax._nowcaster import is_drift
from wnn_jax._roles import ROLES
from wnn_jax._store import DEFAULT_NOWCASTER
from wnn_jax.nowcasters import CURVES, RULES, WNN, AdaptiveLinear, CurveFit, Drift, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nowcaster.npz"


@pytest.fixture(scope="module")
def small_wnn(wnn: WNN) -> WNN:
    return WNN({"dense": wnn.params["dense"]})


def rewrite(path: Path, **changes: Any) -> None:
    """Writes a saved file again with other metadata, or other arrays (`None` leaves one out)."""
    with np.load(path) as file:
        content: dict[str, Any] = dict(file)
    metadata = json.loads(str(content["metadata"]))
    arrays = {name: change for name, change in changes.items() if name not in metadata}
    metadata |= {name: change for name, change in changes.items() if name in metadata}
    content |= {"metadata": np.array(json.dumps(metadata))} | arrays
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


# Round trips


def test_wnn_comes_back_as_it_was(wnn: WNN, path: Path):
    record = {"tasks": ["mnist", "cifar10"], "steps": 20_000, "loss": 0.125, "notes": {"é": None}, "final": True}
    saved = WNN(wnn.params, published_bias=True, chunk_size=77, record=record)
    wnn_jax.save(saved, path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, WNN)
    assert (loaded.published_bias, loaded.chunk_size, loaded.record) == (True, 77, record)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(saved.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, saved.params)


def test_a_loaded_wnn_predicts_what_the_saved_one_did(small_wnn: WNN, path: Path):
    wnn_jax.save(small_wnn, path)
    history = [jnp.arange(3.0) * t for t in range(5)]
    loaded: Any = wnn_jax.load(path)
    np.testing.assert_array_equal(loaded(history, "dense", None), small_wnn(history, "dense", None))


def test_bfloat16_networks_are_saved_without_loss(small_wnn: WNN, path: Path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_wnn.params)
    wnn_jax.save(WNN(params), path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, WNN)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize("cls", [WNNPlus, AdaptiveLinear])
def test_multi_horizon_networks_come_back_as_they_were(cls: type[MultiHorizonNowcaster], path: Path):
    params = cls.init(jax.random.key(0), width=8, num_hidden=2).params
    horizon: Any = np.int64(7)
    saved = cls(params, default_horizon=horizon, chunk_size=77, record={"steps": 20_000})
    wnn_jax.save(saved, path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, cls)
    assert (loaded.default_horizon, loaded.chunk_size, loaded.record) == (7, 77, {"steps": 20_000})
    assert_trees_equal(loaded.params, params)
    history = [jnp.arange(3.0) * t**2 for t in range(5)]
    np.testing.assert_array_equal(loaded(history, "norm", 40), saved(history, "norm", 40))
    with np.load(path) as file:
        assert "params/hidden_1/kernel" in file.files
        metadata = json.loads(str(file["metadata"]))
    assert (metadata["class"], metadata["context"], metadata["roles"]) == (cls.__name__, 5, list(ROLES))


@pytest.mark.parametrize("kind", CURVES)
def test_curve_fits_come_back_as_they_were(kind: str, path: Path):
    saved = CurveFit(kind, chunk_size=1000)
    wnn_jax.save(saved, path)
    assert wnn_jax.load(path) == saved


@pytest.mark.parametrize(
    "saved", [Drift(), Drift(spectral=False, memory=0.2, gain=1, max_gain=2.5, reach=0.5, snapshot_every=7)]
)
def test_drifts_come_back_as_they_were(saved: Drift, path: Path):
    wnn_jax.save(saved, path)
    assert wnn_jax.load(path) == saved


@pytest.mark.parametrize("as_argument", [str, Path], ids=["str", "Path"])
def test_paths_may_be_strings(as_argument: Any, path: Path):
    wnn_jax.save(CurveFit("linear"), as_argument(path))
    assert wnn_jax.load(as_argument(path)) == CurveFit("linear")


def test_the_file_says_what_is_in_it(wnn: WNN, path: Path):
    wnn_jax.save(wnn, path)
    with np.load(path, allow_pickle=False) as file:
        metadata = json.loads(str(file["metadata"]))
        assert "params/conv/values/expand/kernel" in file.files
    assert (metadata["format"], metadata["version"], metadata["class"]) == ("wnn_jax.nowcaster", 1, "WNN")
    assert (metadata["context"], metadata["roles"]) == (5, ["bias", "conv", "dense"])


# Names


def test_every_available_name_loads():
    assert {"drift", "slow-drift", *CURVES} <= set(wnn_jax.available())
    for name in wnn_jax.available():
        nowcaster: Any = wnn_jax.load(name)
        assert is_drift(nowcaster) or nowcaster.context == 5


def test_bundled_networks_are_available(small_wnn: WNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnn_jax._store._bundled_folder", lambda: tmp_path)
    wnn_jax.save(small_wnn, tmp_path / "ours.npz")
    assert wnn_jax.available() == ("ours", *RULES)
    assert isinstance(wnn_jax.load("ours"), WNN)


def test_the_default_is_a_name_that_is_available():
    assert DEFAULT_NOWCASTER in wnn_jax.available()
    assert wnn_jax.load() == wnn_jax.load(DEFAULT_NOWCASTER) == Drift()


@pytest.mark.parametrize(("name", "spectral"), [("drift", True), ("slow-drift", False)])
def test_one_of_the_drifts_orthogonalises_matrices(name: str, spectral: bool):
    drift = wnn_jax.load(name)
    assert isinstance(drift, Drift)
    assert drift.spectral == spectral


BUNDLED = Path(__file__).parents[1] / "params"


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.npz")), ids=lambda path: path.stem)
def test_the_record_of_a_bundled_network_says_what_was_held_out_and_what_it_scored(path: Path):
    record = json.loads(path.with_suffix(".json").read_text())
    nowcaster = wnn_jax.load(path.stem)
    assert isinstance(nowcaster, (WNN, WNNPlus, AdaptiveLinear))
    assert record == nowcaster.record
    assert record["name"] == path.stem
    data = record["data"]
    trained, held_out = set(data["train"]["architectures"]), set(data["held-out architecture"]["architectures"])
    assert trained.isdisjoint(held_out)
    for family, seeds in data["train"]["seeds"].items():
        assert set(seeds).isdisjoint(data["validation"]["seeds"][family])
    assert data["train"]["runs"] == sum(map(len, data["train"]["seeds"].values())) > 0
    assert record["scores"]
    assert {"jax", "optax"} <= record["versions"].keys()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"nowcaster='linaer' is not known\. Known names: .*linear, quadratic, .*path"):
        wnn_jax.load("linaer")


@pytest.mark.parametrize("name", ["nowcaster.npz", "folder/nowcaster", "folder/nowcaster.npz", "wnn.npz"])
def test_a_missing_file(tmp_path: Path, name: str):
    with pytest.raises(FileNotFoundError, match=f"no nowcaster file at '{tmp_path}/{name}'; wnn_jax.save"):
        wnn_jax.load(tmp_path / name)


# Files that are no nowcasters

NOT_OURS = r"cannot be read as a nowcaster: it is damaged, or wnn_jax\.save did not write it"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file(small_wnn: WNN, path: Path, share: float):
    wnn_jax.save(small_wnn, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"nowcaster\.npz cannot be read as a nowcaster: it is damaged"):
        wnn_jax.load(path)


def damaged_copies(whole: bytes) -> Iterator[bytes]:
    for position in range(0, len(whole), 3):
        yield whole[:position] + bytes([whole[position] ^ 0x81]) + whole[position + 1 :]


def test_a_changed_byte_is_noticed_or_harmless(path: Path):
    wnn_jax.save(CurveFit("power", chunk_size=123), path)
    num_noticed = 0
    for damaged in damaged_copies(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            assert wnn_jax.load(path) == CurveFit("power", chunk_size=123)
        except ValueError as error:
            assert "nowcaster.npz" in str(error)  # noqa: PT017
            num_noticed += 1
    assert num_noticed > 100


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", np.random.default_rng(0).bytes(1000), b"{}"])
def test_other_bytes(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"kernel": np.zeros(3)},
        {"metadata": np.zeros(3)},
        {"metadata": np.array("[1, 2]")},
        {"metadata": np.array('{"version": 1}')},
        {"metadata": np.array('{"format": "wnn_jax.nowcaster", "version": null}')},
    ],
)
def test_an_archive_of_other_arrays(path: Path, arrays: dict[str, Any]):
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


def test_a_single_array(tmp_path: Path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(tmp_path / "array.npy")


class Exploding:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["metadata", "params/dense/output/bias"])
def test_pickled_arrays_are_never_loaded(small_wnn: WNN, path: Path, name: str):
    wnn_jax.save(small_wnn, path)
    rewrite(path, **{name: np.array([Exploding()], object)})
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


def test_a_pickle_is_never_loaded(path: Path):
    path.write_bytes(pickle.dumps(Exploding()))
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


def test_a_file_of_another_format(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, format="other.nowcaster")
    with pytest.raises(ValueError, match=r"is not a nowcaster: its format is 'other.nowcaster', not 'wnn_jax.nowcas"):
        wnn_jax.load(path)


def test_a_file_of_a_newer_version(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, version=2)
    with pytest.raises(ValueError, match="has format version 2, but this wnn_jax reads up to 1; upgrade wnn_jax"):
        wnn_jax.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "NiNo"},
        {"settings": {"chunk_size": 0}},
        {"settings": {"chunk_size": "many"}},
        {"settings": {"temperature": 1}},
        {"settings": [1]},
        {"params/dense/output/bias": None},
        {"params/dense/output/bias": np.zeros(2)},
        {"params/dense/output/bias": np.array(["x"])},
        {"params/conv/output/bias": np.zeros(1)},
        {"params/rnn/output/bias": np.zeros(1)},
        {"other": np.zeros(1)},
    ],
    ids=str,
)
def test_a_file_that_makes_no_nowcaster(small_wnn: WNN, path: Path, changes: dict[str, Any]):
    assert_damaged(small_wnn, path, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "WNN"},
        {"class": "AdaptiveLinear"},
        {"settings": {"default_horizon": 41}},
        {"settings": {"default_horizon": "far"}},
        {"params/output/kernel": None},
        {"params/output/kernel": np.zeros(3)},
        {"params/output/kernel": np.array("x")},
        {"params/expand/bias": np.zeros(2)},
        {"params/output": np.zeros(1)},
        {"other": np.zeros(1)},
    ],
    ids=str,
)
def test_a_file_that_makes_no_wnn_plus(wnn_plus: WNNPlus, path: Path, changes: dict[str, Any]):
    assert_damaged(wnn_plus, path, changes)


def assert_damaged(nowcaster: wnn_jax.Nowcaster, path: Path, changes: dict[str, Any]) -> None:
    """Whether the file of a nowcaster is refused with these changes."""
    wnn_jax.save(nowcaster, path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"nowcaster\.npz is damaged: what it holds makes no nowcaster"):
        wnn_jax.load(path)


def test_a_curve_fit_has_no_weights(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, **{"params/dense": np.zeros(1)})
    with pytest.raises(ValueError, match="what it holds makes no nowcaster"):
        wnn_jax.load(path)


# Saving


def test_functions_are_not_saved(path: Path):
    nowcaster = wnn_jax.leafwise(lambda history, role, horizon: history[-1])
    with pytest.raises(ValueError, match=r"cannot be saved: its class is none of WNN, .*CurveFit.*wnn_jax\.leafwise"):
        wnn_jax.save(nowcaster, path)
    assert not path.exists()


@pytest.mark.parametrize("value", [np.float32(0.5), jnp.zeros(3), {1, 2}, Path("here")], ids=repr)
def test_a_record_that_json_does_not_have(small_wnn: WNN, path: Path, value: Any):
    with pytest.raises(TypeError, match=r"nowcaster\.record cannot be saved: .* not JSON serializable"):
        wnn_jax.save(WNN(small_wnn.params, record={"loss": value}), path)
    assert not path.exists()


def test_an_interrupted_save_leaves_the_old_file(small_wnn: WNN, path: Path, monkeypatch: pytest.MonkeyPatch):
    wnn_jax.save(CurveFit("linear"), path)

    def write_half(file: Any, **arrays: Any) -> None:
        del arrays
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", write_half)
    with pytest.raises(KeyboardInterrupt):
        wnn_jax.save(small_wnn, path)
    assert list(path.parent.iterdir()) == [path]
    assert wnn_jax.load(path) == CurveFit("linear")


def test_a_save_replaces_what_was_there(small_wnn: WNN, path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    wnn_jax.save(small_wnn, path)
    assert isinstance(wnn_jax.load(path), WNN)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_mode_follows_the_umask(path: Path, umask: int, mode: int):
    previous = os.umask(umask)
    try:
        wnn_jax.save(CurveFit("linear"), path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == mode
