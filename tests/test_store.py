"""Nowcasters that are saved and loaded."""

import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from wnn_jax import _files
from wnn_jax._roles import ROLES
from wnn_jax._store import DEFAULT_NOWCASTER, fingerprint
from wnn_jax.nowcasters import CURVES, RULES, WNN, CurveFit, Drift, PooledLinear, WNNPlus
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nowcaster.npz"


@pytest.fixture(scope="module")
def small_wnn(wnn: WNN) -> WNN:
    return WNN({"dense": wnn.params["dense"]})


def rewrite(path: Path, **changes: Any) -> None:
    """Write a saved file again with another header, or other arrays (`None` leaves one out), and their checksum."""
    header, arrays = _files.read_arrays(path)
    changed: dict[str, Any] = dict(arrays)
    changed |= {name: change for name, change in changes.items() if name not in header}
    header |= {name: change for name, change in changes.items() if name in header}
    _files.write_arrays(path, {name: array for name, array in changed.items() if array is not None}, header)


# Round trips


def test_wnn_comes_back_as_it_was(wnn: WNN, path: Path):
    record = {"tasks": ["mnist", "cifar10"], "steps": 20_000, "loss": 0.125, "notes": {"é": None}, "final": True}
    saved = WNN(wnn.params, published_bias=True, chunk_size=77, record=record)
    wnn_jax.save(saved, str(path))
    loaded = wnn_jax.load(str(path))
    assert isinstance(loaded, WNN)
    assert (loaded.published_bias, loaded.chunk_size, loaded.record) == (True, 77, record)
    assert_trees_equal(loaded.params, saved.params)
    header, arrays = _files.read_arrays(path)
    assert "params/conv/values/expand/kernel" in arrays
    assert (header["format"], header["version"], header["class"]) == ("wnn_jax.nowcaster", 2, "WNN")
    assert (header["context"], header["roles"]) == (5, ["bias", "conv", "dense"])


def test_bfloat16_networks_are_saved_without_loss(small_wnn: WNN, path: Path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_wnn.params)
    wnn_jax.save(WNN(params), path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, WNN)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("cls", [WNNPlus, PooledLinear])
def test_multi_horizon_networks_come_back_as_they_were(cls: type[MultiHorizonNowcaster], path: Path):
    params = cls.init(jax.random.key(0), width=8, num_hidden=2).params
    horizon: Any = np.int64(7)
    settings = {"default_horizon": 7} | ({} if cls is PooledLinear else {"chunk_size": 77})
    saved = cls(params, **(settings | {"default_horizon": horizon}), record={"steps": 20_000})
    wnn_jax.save(saved, path)
    loaded = wnn_jax.load(path)
    assert isinstance(loaded, cls)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.record == {"steps": 20_000}
    assert_trees_equal(loaded.params, params)
    history = [jnp.arange(3.0) * t**2 for t in range(5)]
    np.testing.assert_array_equal(loaded(history, "norm", 40), saved(history, "norm", 40))
    metadata, arrays = _files.read_arrays(path)
    assert ("params/column/" if cls is PooledLinear else "params/") + "hidden_1/kernel" in arrays
    assert (metadata["class"], metadata["context"], metadata["roles"]) == (cls.__name__, 5, list(ROLES))


@pytest.mark.parametrize(
    "saved",
    [
        *(CurveFit(kind, chunk_size=1000) for kind in CURVES),
        Drift(),
        Drift(spectral=False, memory=0.2, gain=1, max_gain=2.5, reach=0.5, snapshot_every=7),
    ],
)
def test_rules_come_back_as_they_were(saved: Any, path: Path):
    wnn_jax.save(saved, path)
    assert wnn_jax.load(path) == saved


def test_weights_are_never_rounded(small_wnn: WNN, path: Path):
    with jax.enable_x64(True):
        saved = WNN(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 1e-12, small_wnn.params))
        wnn_jax.save(saved, path)
        assert fingerprint(wnn_jax.load(path)) == fingerprint(saved)
    with pytest.raises(ValueError, match=r"nowcaster\.npz has weights in float64, .* Set jax_enable_x64"):
        wnn_jax.load(path)


# Names

BUNDLED = Path(__file__).parents[1] / "params"


def test_every_available_name_loads():
    assert {"drift", "slow-drift", *CURVES} <= set(wnn_jax.available())
    for name in wnn_jax.available():
        nowcaster: Any = wnn_jax.load(name)
        assert isinstance(nowcaster, Drift) or nowcaster.context == 5
    assert DEFAULT_NOWCASTER in wnn_jax.available()
    assert wnn_jax.load() == wnn_jax.load(DEFAULT_NOWCASTER) == Drift()
    drifts = [wnn_jax.load(name) for name in ("drift", "slow-drift")]
    assert [isinstance(drift, Drift) and drift.spectral for drift in drifts] == [True, False]


def test_bundled_networks_are_available(small_wnn: WNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnn_jax._store._bundled_folder", lambda: tmp_path)
    wnn_jax.save(small_wnn, tmp_path / "ours.npz")
    assert wnn_jax.available() == ("ours", *RULES)
    assert isinstance(wnn_jax.load("ours"), WNN)


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.npz")), ids=lambda path: path.stem)
def test_the_record_of_a_bundled_network_says_what_was_held_out_and_what_it_scored(path: Path):
    record = json.loads(path.with_suffix(".json").read_text())
    nowcaster: Any = wnn_jax.load(path.stem)
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


@pytest.mark.parametrize("name", ["nowcaster.npz", "folder/nowcaster", "wnn.npz"])
def test_a_missing_file(tmp_path: Path, name: str):
    with pytest.raises(FileNotFoundError, match=f"no nowcaster file at '{tmp_path}/{name}'; wnn_jax.save"):
        wnn_jax.load(tmp_path / name)


# Files that are no nowcasters

NOT_OURS = r"nowcaster\.npz cannot be read: it is damaged, or this wnn_jax did not write it .*save the nowcaster again"


class Exploding:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["metadata", "params/dense/output/bias"])
def test_pickles_are_never_loaded(small_wnn: WNN, path: Path, name: str):
    wnn_jax.save(small_wnn, path)
    with np.load(path) as file:
        content: dict[str, Any] = {**file, name: np.array([Exploding()], object)}
    np.savez(path, **content)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)
    path.write_bytes(pickle.dumps(Exploding()))
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


@pytest.mark.parametrize(
    "change", [{"format": "other.nowcaster"}, *({"version": value} for value in (1, 3, 2.0, None))]
)
def test_a_file_of_another_format_or_version(path: Path, change: dict[str, Any]):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, **change)
    with pytest.raises(
        ValueError, match=r"has the format '.*', version .*; this wnn_jax reads 'wnn_jax\.nowcaster', version 2.*again"
    ):
        wnn_jax.load(path)


@pytest.mark.parametrize("name", ["Introspection", "LearnedDrift"])
def test_a_file_of_a_class_that_was_removed(path: Path, name: str):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, **{"class": name})
    with pytest.raises(ValueError, match=rf"nowcaster\.npz holds a .* class '{name}', .*: wnn_jax 0\.2\.0\.dev0 reads"):
        wnn_jax.load(path)


BIAS = "params/dense/output/bias"


@pytest.mark.parametrize(
    "changes",
    [
        *({"class": name} for name in ("NiNo", "WNNPlus", "Unknown", None)),
        *({"settings": value} for value in ({"chunk_size": 0}, {"chunk_size": "many"}, {"temperature": 1}, [1])),
        {"context": 4},
        {"roles": ["conv"]},
        {BIAS: None},
        {BIAS: np.zeros(2, np.float32)},
        *({BIAS: np.array([1]).astype(dtype)} for dtype in ("bool", "i4", "f2", jnp.bfloat16)),
        *({BIAS: np.array([value], np.float32)} for value in (np.nan, np.inf)),
        {"params/conv/output/bias": np.zeros(1, np.float32)},
        {"params/dense/output": np.zeros(1, np.float32)},
        {"params/rnn/output/bias": np.zeros(1, np.float32)},
        {"other": np.zeros(1, np.float32)},
    ],
    ids=str,
)
def test_a_file_that_makes_no_nowcaster(small_wnn: WNN, path: Path, changes: dict[str, Any]):
    wnn_jax.save(small_wnn, path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=NOT_OURS):
        wnn_jax.load(path)


def test_a_curve_fit_has_no_weights(path: Path):
    wnn_jax.save(CurveFit("linear"), path)
    rewrite(path, **{"params/dense": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="unexpected keyword argument 'params'"):
        wnn_jax.load(path)


# Nowcasters that cannot be saved


def test_functions_are_not_saved(path: Path):
    nowcaster = wnn_jax.leafwise(lambda history, role, horizon: history[-1])
    with pytest.raises(ValueError, match=r"cannot be saved: its class is none of WNN, .*CurveFit.*wnn_jax\.leafwise"):
        wnn_jax.save(nowcaster, path)


@pytest.mark.parametrize("value", [np.float32(0.5), jnp.zeros(3), {1, 2}, Path("here"), [float("nan")]], ids=repr)
def test_a_record_that_json_does_not_have(small_wnn: WNN, path: Path, value: Any):
    error = ValueError if isinstance(value, list) else TypeError
    with pytest.raises(error, match=r"nowcaster\.record cannot be saved: .* not JSON .*finite numbers"):
        wnn_jax.save(WNN(small_wnn.params, record={"loss": value}), path)
    assert not path.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, np.complex64(1j), np.True_, np.int32(1)])
def test_weights_that_are_no_finite_floats(small_wnn: WNN, path: Path, value: Any):
    dense = small_wnn.params["dense"]
    bias = np.full(1, value)
    changed = WNN({"dense": {**dense, "output": {**dense["output"], "bias": bias}}})
    with pytest.raises(ValueError, match=rf"{BIAS}, of {bias.dtype}, must have finite floats only"):
        wnn_jax.save(changed, path)
    assert not path.exists()
