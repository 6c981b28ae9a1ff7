import io
import json
import os
import pickle
import re
import stat
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.campaign.damage import REWRITES
from tests.helpers import assert_trees_equal
from wnn_jax._roles import ROLES
from wnn_jax._store import DEFAULT_NOWCASTER, _write, fingerprint
from wnn_jax.nowcasters import CURVES, RULES, WNN, AdaptiveLinear, CurveFit, Drift, NiNo, Pooled, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nowcaster.npz"


@pytest.fixture(scope="module")
def small_wnn(wnn: WNN) -> WNN:
    return WNN({"dense": wnn.params["dense"]})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the arrays of a saved file."""
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    return json.loads(str(arrays.pop("metadata"))), arrays


def rewrite(path: Path, **changes: Any) -> None:
    """Writes a saved file again with other metadata, or other arrays (`None` leaves one out), and their checksum."""
    metadata, arrays = read(path)
    del metadata["sha256"]
    arrays |= {name: change for name, change in changes.items() if name not in metadata}
    metadata |= {name: change for name, change in changes.items() if name in metadata}
    _write(path, metadata, {name: array for name, array in arrays.items() if array is not None})


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


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("cls", [WNNPlus, AdaptiveLinear, Pooled])
def test_multi_horizon_networks_come_back_as_they_were(cls: type[MultiHorizonNowcaster], path: Path):
    params = cls.init(jax.random.key(0), width=8, num_hidden=2).params
    horizon: Any = np.int64(7)
    settings = {"default_horizon": 7} | ({} if cls is Pooled else {"chunk_size": 77})
    saved = cls(params, **(settings | {"default_horizon": horizon}), record={"steps": 20_000})
    wnn_jax.save(saved, path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, cls)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.record == {"steps": 20_000}
    assert_trees_equal(loaded.params, params)
    history = [jnp.arange(3.0) * t**2 for t in range(5)]
    np.testing.assert_array_equal(loaded(history, "norm", 40), saved(history, "norm", 40))
    metadata, arrays = read(path)
    assert ("params/column/" if cls is Pooled else "params/") + "hidden_1/kernel" in arrays
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
    metadata, arrays = read(path)
    assert "params/conv/values/expand/kernel" in arrays
    assert (metadata["format"], metadata["version"], metadata["class"]) == ("wnn_jax.nowcaster", 2, "WNN")
    assert (metadata["context"], metadata["roles"]) == (5, ["bias", "conv", "dense"])


# Names


def test_every_available_name_loads():
    assert {"drift", "slow-drift", *CURVES} <= set(wnn_jax.available())
    for name in wnn_jax.available():
        nowcaster: Any = wnn_jax.load(name)
        assert isinstance(nowcaster, Drift) or nowcaster.context == 5


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
    assert isinstance(nowcaster, (WNN, WNNPlus, AdaptiveLinear, NiNo, Pooled))
    assert record == nowcaster.record
    assert record["name"] == path.stem
    data = record["data"]
    # Records of the first version know one split of other architectures, and no test.
    held_out = [split for split in data if split.endswith("architecture")]
    assert held_out
    for split in held_out:
        assert set(data["train"]["architectures"]).isdisjoint(data[split]["architectures"])
    for split in ("validation", "test"):
        for family, seeds in data["train"]["seeds"].items():
            assert set(seeds).isdisjoint(data.get(split, data["validation"])["seeds"][family])
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
    with np.load(path) as file:
        content: dict[str, Any] = {**file, name: np.array([Exploding()], object)}
    np.savez(path, **content)
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


@pytest.mark.parametrize("version", [1, 3])
def test_a_file_of_another_version(path: Path, version: int):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, version=version)
    with pytest.raises(
        ValueError, match=f"has format version {version}, but this wnn_jax reads version 2. Use the wnn"
    ):
        wnn_jax.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "NiNo"},
        {"settings": {"chunk_size": 0}},
        {"settings": {"chunk_size": "many"}},
        {"settings": {"temperature": 1}},
        {"settings": [1]},
        *({"version": version} for version in (0, -2, 2.0, True, "2", None, [2])),
        {"context": 4},
        {"roles": ["conv"]},
        {"params/dense/output/bias": None},
        {"params/dense/output/bias": np.zeros(2, np.float32)},
        *(
            {"params/dense/output/bias": np.array([1]).astype(dtype)}
            for dtype in ("bool", "i4", "f2", ">f4", "c8", "U1")
        ),
        *({"params/dense/output/bias": np.array([value], np.float32)} for value in (np.nan, np.inf, -np.inf)),
        {"params/conv/output/bias": np.zeros(1, np.float32)},
        {"params/rnn/output/bias": np.zeros(1, np.float32)},
        {"other": np.zeros(1, np.float32)},
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
        {"params/output/kernel": np.zeros(3, np.float32)},
        {"params/output/kernel": np.array("x")},
        {"params/expand/bias": np.zeros(2, np.float32)},
        {"params/output": np.zeros(1, np.float32)},
        {"other": np.zeros(1, np.float32)},
    ],
    ids=str,
)
def test_a_file_that_makes_no_wnn_plus(wnn_plus: WNNPlus, path: Path, changes: dict[str, Any]):
    assert_damaged(wnn_plus, path, changes)


def assert_damaged(nowcaster: wnn_jax.Nowcaster, path: Path, changes: dict[str, Any]) -> None:
    """Whether the file of a nowcaster is refused with these changes."""
    wnn_jax.save(nowcaster, path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


def test_a_curve_fit_has_no_weights(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, **{"params/dense": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="unexpected keyword argument 'params'"):
        wnn_jax.load(path)


# Files of nowcasters that were changed


def test_no_length_of_a_header_is_taken_for_another(small_wnn: WNN, path: Path):
    wnn_jax.save(small_wnn, path)
    whole = path.read_bytes()
    for start in [match.end() for match in re.finditer(b"NUMPY\x01\x00", whole)][:3]:
        for bit in range(16):
            position = start + bit // 8
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit % 8]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=NOT_OURS):
                wnn_jax.load(path)


@pytest.mark.parametrize(
    "changes",
    [{"version": 2, "settings": {"chunk_size": 7}}, {"class": "WNNPlus"}, {"sha256": None}, {"other": 1}],
    ids=str,
)
def test_metadata_that_its_checksum_does_not_cover(small_wnn: WNN, path: Path, changes: dict[str, Any]):
    wnn_jax.save(small_wnn, path)
    metadata, arrays = read(path)
    np.savez(path, metadata=np.array(json.dumps(metadata | changes)), **arrays)
    with pytest.raises(ValueError, match="its content is not that of its checksum"):
        wnn_jax.load(path)


def test_weights_that_their_checksum_does_not_cover(small_wnn: WNN, path: Path):
    wnn_jax.save(small_wnn, path)
    with np.load(path) as file:
        arrays: dict[str, Any] = dict(file)
    one, other = "params/dense/values/expand/bias", "params/dense/differences/gain/bias"
    np.savez(path, **arrays | {one: arrays[other] + 1, other: arrays[one]})
    with pytest.raises(ValueError, match="its content is not that of its checksum"):
        wnn_jax.load(path)


def test_a_number_that_json_does_not_have(path: Path):
    wnn_jax.save(Drift(), path)
    metadata, _ = read(path)
    for number in ("NaN", "Infinity", "1e999"):
        np.savez(path, metadata=np.array(json.dumps(metadata).replace("10.0", number)))
        with pytest.raises(ValueError, match=NOT_OURS):
            wnn_jax.load(path)


def test_weights_are_never_rounded(small_wnn: WNN, path: Path):
    with jax.enable_x64(True):
        saved = WNN(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 1e-12, small_wnn.params))
        wnn_jax.save(saved, path)
        assert fingerprint(wnn_jax.load(path)) == fingerprint(saved)
    with pytest.raises(ValueError, match=r"nowcaster\.npz has weights in float64, .* Set jax_enable_x64"):
        wnn_jax.load(path)


def test_two_files_one_behind_the_other(small_wnn: WNN, path: Path):
    contents: list[bytes] = []
    for nowcaster in (small_wnn, CurveFit("linear")):
        wnn_jax.save(nowcaster, path)
        contents.append(path.read_bytes())
    path.write_bytes(b"".join(contents))
    with pytest.raises(ValueError, match="something else comes before it"):
        wnn_jax.load(path)


# Files that declare themselves larger than they are


def zipped(path: Path, compression: int, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def assert_little_memory(path: Path, match: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match=match):
        wnn_jax.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_nothing_is_unpacked_that_is_larger_than_the_file(path: Path):
    zipped(path, zipfile.ZIP_DEFLATED, metadata=npy(np.array("{}")), params=npy(np.zeros(10**7, np.float32)))
    assert_little_memory(path, "it is compressed")


def test_members_do_not_share_their_bytes(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    nested = REWRITES[".npz"]["nested"](np.random.default_rng(0), path.read_bytes(), b"")
    path.write_bytes(nested.content)
    assert_little_memory(path, "it is shorter than what it holds")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3L,), ",
        "{'descr': '<a4', 'fortran_order': False, 'shape': (1,), }",
        "(" * 5000,
    ],
    ids=lambda header: header[:60],
)
def test_a_header_that_numpy_would_not_refuse_by_a_value_error(small_wnn: WNN, path: Path, header: str):
    wnn_jax.save(small_wnn, path)
    member = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n"
    zipped(path, zipfile.ZIP_STORED, metadata=npy(np.array(json.dumps(read(path)[0]))), params=member)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_members_of_one_name(small_wnn: WNN, path: Path):
    wnn_jax.save(small_wnn, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("params/dense/output/bias.npy", npy(np.ones(1, np.float32)))
    with pytest.raises(ValueError, match="it holds two arrays of one name"):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_of_numbers_that_are_not_finite(small_wnn: WNN, path: Path, value: float):
    with pytest.raises(ValueError, match=r"nowcaster\.record cannot be saved: .* not JSON compliant.* finite numbers"):
        wnn_jax.save(WNN(small_wnn.params, record={"loss": [value]}), path)
    assert not path.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, np.complex64(1j), np.True_, np.int32(1)])
def test_weights_that_are_no_finite_floats(small_wnn: WNN, path: Path, value: Any):
    dense = small_wnn.params["dense"]
    bias = np.full(1, value)
    changed = WNN({"dense": {**dense, "output": {**dense["output"], "bias": bias}}})
    with pytest.raises(ValueError, match=rf"params/dense/output/bias, of {bias.dtype}, must have finite floats only"):
        wnn_jax.save(changed, path)
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
