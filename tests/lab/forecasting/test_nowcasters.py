import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wnn_jax
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.nowcasters import Export, export, load_nowcaster
from wnn_jax.lab.output import save_rows


@pytest.fixture
def nowcaster(tmp_path: Path, wnn_plus: Any) -> Path:
    path = tmp_path / "nowcaster.npz"
    wnn_jax.save(wnn_plus, path)
    return path


@pytest.fixture
def summary(tmp_path: Path, nowcaster: Path) -> Callable[..., Path]:
    """Writes a table of methods."""

    def write(**changes: Any) -> Path:
        expected = fingerprint(wnn_jax.load(nowcaster))
        methods = ("plain", "linear", "nowcaster", "nowcaster@0.5~3+wsd", "nowcaster-of-another-name")
        rows = [
            {"method": method, "fingerprint": expected, "reading": "weights", "steps_saved": 0.1 * number, **changes}
            for number, method in enumerate(methods)
        ]
        save_rows(rows, tmp_path / "summary.csv")
        return tmp_path / "summary.csv"

    return write


@pytest.mark.parametrize(
    ("specification", "label", "scale"),
    [
        ("linear", "linear", 1.0),
        ("wnn-plus@-1", "wnn-plus@-1", -1.0),
        ("{file}", "nowcaster", 1.0),
        ("{file}@0.25", "nowcaster@0.25", 0.25),
    ],
)
def test_a_nowcaster_has_a_label_and_a_scale(
    nowcaster: Path, tmp_path: Path, specification: str, label: str, scale: float
):
    folder = tmp_path / "a@b"
    folder.mkdir()
    file = shutil.copy(nowcaster, folder)
    assert load_nowcaster(specification.format(file=file))[0::2] == (label, scale)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("best", "not known"),
        ("linear@much", "could not convert string to float: 'much'; give NAME or NAME@0.5"),
        ("linear@", "cannot be used"),
        ("", "cannot be used"),
        ("missing.npz", "there is no nowcaster file"),
    ],
)
def test_a_bad_specification_is_named(specification: str, message: str):
    with pytest.raises(UsageError, match=rf"the nowcaster '{specification}' cannot be used: .*") as refused:
        load_nowcaster(specification)
    assert message in str(refused.value)


def test_an_export_is_a_nowcaster_with_its_record(nowcaster: Path, summary: Callable[..., Path], tmp_path: Path):
    path = export(Export(nowcaster=nowcaster, name="ours", output=tmp_path / "params", evaluation=(summary(),)))
    before: Any = wnn_jax.load(nowcaster)
    after: Any = wnn_jax.load(path)
    assert fingerprint(before) == fingerprint(after)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record == after.record
    assert (record["name"], record["class"]) == ("ours", "WNNPlus")
    assert record["scores"] == {"nowcaster": {"steps_saved": 0.2}, "nowcaster@0.5~3+wsd": {"steps_saved": 0.3}}
    assert {file.name for file in path.parent.iterdir()} == {"ours.npz", "ours.json"}


def test_scores_of_another_nowcaster_are_refused(nowcaster: Path, summary: Callable[..., Path], tmp_path: Path):
    expected = fingerprint(wnn_jax.load(nowcaster))
    options = Export(nowcaster=nowcaster, name="ours", output=tmp_path / "params", evaluation=(summary(),))
    for other, shown in (("ab", "ab"), (None, "unknown")):
        summary(fingerprint=other)
        with pytest.raises(
            UsageError, match=rf"'nowcaster' has the fingerprint {shown}, but --nowcaster .* has {expected}"
        ):
            export(options)
    shutil.copy(nowcaster, tmp_path / "theirs.npz")
    with pytest.raises(UsageError, match="--evaluation has no method of 'theirs', only: linear, nowcaster"):
        export(Export(nowcaster=tmp_path / "theirs.npz", name="ours", evaluation=(summary(),)))
    assert not (tmp_path / "params").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Ours!"}, "--name 'Ours!' must be of lower-case letters"),
        ({"nowcaster": Path("missing.npz")}, r"--nowcaster missing\.npz cannot be used"),
        ({"nowcaster": Path("linear")}, "is a CurveFit, which has no record: it is not trained"),
        ({"evaluation": (Path("missing.csv"),)}, r"--evaluation missing\.csv is no table of methods"),
        ({"evaluation": (Path(__file__),)}, r"is no table of methods \('method'\); give the `summary.csv`"),
    ],
)
def test_bad_exports_are_named(nowcaster: Path, tmp_path: Path, options: dict[str, Any], message: str):
    settings: dict[str, Any] = {"nowcaster": nowcaster, "name": "ours", "output": tmp_path / "params"}
    with pytest.raises(UsageError, match=message):
        export(Export(**(settings | options)))
    assert not (tmp_path / "params").exists()
