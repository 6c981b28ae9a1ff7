import csv
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

import wnn_jax
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.collection import Collection
from wnn_jax.lab.forecasting.forecast import Forecast, forecast
from wnn_jax.lab.forecasting.nowcasters import load_nowcaster


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "mine.npz"
    wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0), ("bias", "dense")), path)
    return path


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_table_has_the_errors_of_the_split_alone(collection: Path, saved: Path, tmp_path: Path, split: Any):
    nowcasters = ("linear", "linear@0.5", f"{saved}@0")
    rows = forecast(Forecast(nowcasters=nowcasters, collection=(collection,), output=tmp_path, split=split))
    assert [row["method"] for row in rows] == ["linear", "linear@0.5", "mine@0"]
    with (tmp_path / "summary.csv").open(newline="") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert table["mine@0"]["fingerprint"] == fingerprint(wnn_jax.load(saved))
    assert table["linear"]["fingerprint"] == table["linear@0.5"]["fingerprint"]
    for name in (f"{split}, 5 ahead", f"{split} architecture, 5 ahead", f"{split} stage late, 5 ahead"):
        assert float(table["linear"][name]) > 0
        # A jump of no size is a forecast of no change.
        assert float(table["mine@0"][name]) == pytest.approx(1)
    with (tmp_path / "forecast-errors.csv").open(newline="") as file:
        errors = list(csv.DictReader(file))
    assert {row["split"] for row in errors} == {split, f"{split} architecture"}
    assert {row["fingerprint"] for row in errors} == {row["fingerprint"] for row in table.values()}
    assert (tmp_path / "forecast-errors.png").read_bytes().startswith(b"\x89PNG")


def test_running_means_are_forecast_under_a_name_of_their_own(collection: Path, tmp_path: Path):
    plain, means = (
        forecast(Forecast(nowcasters=("linear",), collection=(collection,), output=tmp_path, average=average))[0]
        for average in (False, True)
    )
    assert (plain["method"], means["method"]) == ("linear", "linear+ema")
    assert means["fingerprint"] == plain["fingerprint"]
    # Of a mean a straight line is a better forecast.
    assert means["test, 5 ahead"] < plain["test, 5 ahead"]


def test_the_default_is_what_no_nowcaster_was_selected_by():
    assert Forecast(nowcasters=("linear",), collection=(Path(),), output=Path()).split == "test"


@pytest.mark.parametrize(
    ("nowcasters", "message"),
    [
        ((), r"--nowcasters \(none\) must name at least one, and none twice"),
        (("linear", "linear"), "--nowcasters linear linear must name at least one, and none twice"),
        (("best",), "the nowcaster 'best' cannot be used: .*not known"),
        (("linear@much",), "the nowcaster 'linear@much' cannot be used"),
        (("linear@",), "the nowcaster 'linear@' cannot be used"),
        (("missing.npz",), r"the nowcaster 'missing\.npz' cannot be used: there is no nowcaster file"),
    ],
)
def test_bad_nowcasters_are_named(collection: Path, tmp_path: Path, nowcasters: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        forecast(Forecast(nowcasters=nowcasters, collection=(collection,), output=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_collection_without_such_runs_is_named(collection: Path, tmp_path: Path):
    shutil.copytree(collection, tmp_path / "collection")
    for trajectory in Collection(tmp_path / "collection").trajectories():
        if trajectory.split.startswith("test"):
            trajectory.file.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match="has no finished run for 'test'; collect more runs"):
        forecast(Forecast(nowcasters=("linear",), collection=(tmp_path / "collection",), output=tmp_path / "output"))


def test_a_damaged_run_is_named(collection: Path, tmp_path: Path):
    shutil.copytree(collection, tmp_path / "collection")
    array = tmp_path / "collection" / "run-00000.npy"
    array.write_bytes(array.read_bytes()[:-4] + b"0000")
    with pytest.raises(UsageError, match=r"run-00000\.npy is damaged"):
        forecast(Forecast(nowcasters=("linear",), collection=(tmp_path / "collection",), output=tmp_path / "output"))


@pytest.mark.parametrize(
    ("specification", "label", "scale"),
    [("linear", "linear", 1.0), ("linear@0.5", "linear@0.5", 0.5), ("wnn-plus@-1", "wnn-plus@-1", -1.0)],
)
def test_a_nowcaster_is_named_with_its_scale(specification: str, label: str, scale: float):
    assert load_nowcaster(specification)[0::2] == (label, scale)


def test_a_file_is_labeled_by_its_stem(saved: Path, tmp_path: Path):
    folder = tmp_path / "a@b"
    folder.mkdir()
    shutil.copy(saved, folder / "ours.npz")
    assert load_nowcaster(f"{folder}/ours.npz@0.25")[0::2] == ("ours@0.25", 0.25)
    assert load_nowcaster(f"{folder}/ours.npz")[0::2] == ("ours", 1.0)


@pytest.mark.slow
def test_all_nowcasters_forecast_the_same_runs(collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One whose graph is of one network forecasts no other, and neither do those that it is compared with."""
    runs = [trajectory for trajectory in Collection(collection).trajectories() if trajectory.split == "test"]
    shapes = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, "float32") for leaf in runs[0].leaves}
    params = wnn_jax.nowcasters.NiNo.init(jax.random.key(0), width=4).params
    graph = wnn_jax.nowcasters.neural_graph(shapes)
    wnn_jax.save(wnn_jax.nowcasters.NiNo(params, graph=graph), tmp_path / "nino.npz")
    names = (str(tmp_path / "nino.npz"), "linear")
    forecast(Forecast(nowcasters=names, collection=(collection,), output=tmp_path / "errors"))
    assert "not all nowcasters can forecast them: cnn-8-16" in capsys.readouterr().out
    with (tmp_path / "errors" / "forecast-errors.csv").open(newline="") as file:
        errors = list(csv.DictReader(file))
    assert {row["nowcaster"] for row in errors} == {"nino", "linear"}
    assert {row["split"] for row in errors} == {"test"}
    other = {name.replace("0", "1"): names for name, names in graph["edges"].items()}
    wnn_jax.save(wnn_jax.nowcasters.NiNo(params, graph={"edges": other}), tmp_path / "nino.npz")
    with pytest.raises(UsageError, match="--nowcasters nino linear: there is no run that all of them can forecast"):
        forecast(Forecast(nowcasters=names, collection=(collection,), output=tmp_path / "errors"))
