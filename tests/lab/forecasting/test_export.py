import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wnn_jax
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.export import Export, export
from wnn_jax.lab.output import save_rows


@pytest.fixture
def nowcaster(tmp_path: Path, wnn_plus: Any) -> Path:
    path = tmp_path / "nowcaster.npz"
    wnn_jax.save(wnn_plus, path)
    return path


@pytest.fixture
def summary(tmp_path: Path, nowcaster: Path) -> Callable[..., Path]:
    """Writes a table of methods, of which all but `plain` are of the nowcaster."""

    def write(**changes: Any) -> Path:
        expected = fingerprint(wnn_jax.load(nowcaster))
        methods = ("plain", "linear", "nowcaster", "nowcaster@0.5~3+wsd", "nowcaster-of-another-name")
        rows = [
            {"method": method, "fingerprint": expected, "reading": "weights", "steps_saved": 0.1 * number, **changes}
            for number, method in enumerate(methods)
        ]
        path = tmp_path / "summary.csv"
        save_rows(rows, path)
        return path

    return write


@pytest.mark.slow
def test_an_export_is_a_nowcaster_with_its_record(nowcaster: Path, summary: Callable[..., Path], tmp_path: Path):
    output = tmp_path / "params"
    options = Export(nowcaster=nowcaster, name="ours", output=output, evaluation=(summary(),), default_horizon=7)
    path = export(options)
    before, after = wnn_jax.load(nowcaster), wnn_jax.load(path)
    assert isinstance(before, wnn_jax.nowcasters.WNNPlus)
    assert isinstance(after, wnn_jax.nowcasters.WNNPlus)
    assert after.default_horizon == 7
    record = json.loads(path.with_suffix(".json").read_text())
    assert record == after.record
    assert record["scores"] == {"nowcaster": {"steps_saved": 0.2}, "nowcaster@0.5~3+wsd": {"steps_saved": 0.3}}
    history = [{"w": np.linspace(0, 1, 6, dtype=np.float32) * time**0.5} for time in range(5)]
    np.testing.assert_array_equal(before(history, {"w": "dense"}, 7)["w"], after(history, {"w": "dense"}, None)["w"])
    assert {file.name for file in path.parent.iterdir()} == {"ours.npz", "ours.json"}


def test_scores_of_another_nowcaster_are_refused(nowcaster: Path, summary: Callable[..., Path], tmp_path: Path):
    expected = fingerprint(wnn_jax.load(nowcaster))
    options = Export(
        nowcaster=nowcaster, name="ours", output=tmp_path / "params", evaluation=(summary(fingerprint="ab"),)
    )
    with pytest.raises(
        UsageError, match=rf"'nowcaster' has the fingerprint ab, but that of .*nowcaster\.npz is {expected}"
    ):
        export(options)
    summary(fingerprint=None)
    with pytest.raises(UsageError, match=f"has the fingerprint unknown, but that of .* is {expected}"):
        export(options)
    assert not (tmp_path / "params").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Ours!"}, "--name 'Ours!' must be of lower-case letters"),
        ({"nowcaster": Path("missing.npz")}, r"--nowcaster missing\.npz cannot be used"),
        ({"default_horizon": 41}, "--default-horizon.*from 1 to 40"),
        ({"evaluation": (Path("missing.csv"),)}, r"--evaluation missing\.csv cannot be read"),
        ({"evaluation": (Path(__file__),)}, "is no table of methods; give the `summary.csv` of an evaluation"),
    ],
)
def test_bad_exports_are_named(nowcaster: Path, tmp_path: Path, options: dict[str, Any], message: str):
    settings: dict[str, Any] = {"nowcaster": nowcaster, "name": "ours", "output": tmp_path / "params"}
    with pytest.raises(UsageError, match=message):
        export(Export(**(settings | options)))
    assert not (tmp_path / "params").exists()


def test_a_nowcaster_without_horizon_has_no_default_one(tmp_path: Path, wnn: Any):
    wnn_jax.save(wnn, tmp_path / "wnn.npz")
    with pytest.raises(UsageError, match="--default-horizon 3: a WNN takes none"):
        export(Export(nowcaster=tmp_path / "wnn.npz", name="ours", output=tmp_path / "params", default_horizon=3))


def test_what_is_not_trained_is_not_exported(tmp_path: Path):
    wnn_jax.save(wnn_jax.load("linear"), tmp_path / "curve.npz")
    with pytest.raises(UsageError, match="is a CurveFit, which has no record: it is not trained"):
        export(Export(nowcaster=tmp_path / "curve.npz", name="ours", output=tmp_path / "params"))


def test_an_evaluation_without_the_nowcaster_is_refused(summary: Callable[..., Path], tmp_path: Path, wnn: Any):
    wnn_jax.save(wnn, tmp_path / "theirs.npz")
    with pytest.raises(UsageError, match="--evaluation has no method of 'theirs', only: linear, nowcaster"):
        export(
            Export(
                nowcaster=tmp_path / "theirs.npz",
                name="ours",
                output=tmp_path / "params",
                evaluation=(summary(),),
            )
        )
