import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wnn_jax
from tests.meta.conftest import tiny_family
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.evaluate import Evaluate, evaluate, read_summary
from wnn_jax.meta.export import Export, export
from wnn_jax.meta.forecast_error import HORIZONS, forecast_errors, share
from wnn_jax.meta.train import Train, train
from wnn_jax.meta.trajectories import Collection, Trajectory


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """A run whose weights all move at a speed of their own."""
    collection = Collection.create(tmp_path_factory.mktemp("straight"), tiny_family())
    speed = np.random.default_rng(0).normal(size=[6, 5]).astype(np.float32)
    snapshots = [{"Dense_0": {"kernel": 1 + time * speed, "bias": time * speed[0]}} for time in range(120)]
    collection.save(0, tiny_family().task(0), "validation", snapshots, [1.0] * 120, 1.0)
    return collection.trajectories()


def errors_of(nowcaster: wnn_jax.Nowcaster, runs: list[Trajectory], scale: float = 1.0) -> list[dict[str, Any]]:
    return [row for rows in forecast_errors("it", nowcaster, scale, runs) for row in rows]


def test_a_straight_line_is_forecast_by_a_line(straight: list[Trajectory]):
    rows = errors_of(wnn_jax.load("linear"), straight)
    assert {row["horizon"] for row in rows} == set(HORIZONS)
    assert {row["role"] for row in rows} == {"bias", "dense"}
    assert {row["stage"] for row in rows} == {"early", "middle", "late"}
    for horizon in HORIZONS:
        assert share(rows, horizon=horizon) == pytest.approx(0, abs=1e-4)
    halfway = errors_of(wnn_jax.load("linear"), straight, scale=0.5)
    assert share(halfway, horizon=5, role="dense") == pytest.approx(0.5, abs=1e-4)


def test_no_change_has_a_share_of_one(straight: list[Trajectory]):
    rows = errors_of(wnn_jax.leafwise(lambda history, role, horizon: history[-1]), straight)
    assert share(rows) == pytest.approx(1)
    assert np.isnan(share(rows, horizon=6))


def test_a_nowcaster_without_horizon_is_judged_at_that_of_the_paper(straight: list[Trajectory], wnn: Any):
    assert {row["horizon"] for row in errors_of(wnn, straight)} == {5}


@pytest.fixture(scope="module")
def trained(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(
        Train(collection=(collection,), output=output, num_steps=4, windows_per_role=2, num_weights=8, validate_every=2)
    )
    return output / "nowcaster.npz"


@pytest.fixture(scope="module")
def scores(collection: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scores")
    rows = evaluate(
        Evaluate(
            nowcasters=("none", "linear", str(trained)),
            output=output,
            collection=(collection,),
            tasks=("digits-1e-2",),
            seeds=(0,),
            num_epochs=6,
        )
    )
    assert [row["arm"] for row in rows] == ["none", "linear", "nowcaster"]
    return output


def test_one_table_has_errors_and_steps_saved(scores: Path):
    table = read_summary(scores / "summary.csv")
    assert table.keys() == {"none", "linear", "nowcaster"}
    for figure in (
        "held-out architecture, 5 ahead",
        "validation, 5 ahead",
        "role dense, 5 ahead",
        "stage late, 5 ahead",
    ):
        assert table["nowcaster"][figure] > 0
        assert figure not in table["none"]
    assert table["none"]["digits-1e-2, weights: steps saved"] == 0
    assert 0 < table["linear"]["digits-1e-2, EMA: final"] <= 1
    assert (scores / "forecast-errors.png").read_bytes().startswith(b"\x89PNG")
    assert (scores / "digits-1e-2" / "curves.png").exists()
    assert (scores / "forecast-errors.csv").read_text().count("\n") > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to evaluate: give --collection, --tasks, or both"),
        ({"tasks": ("imagenet",)}, "--tasks imagenet: choose from .*digits-1e-2"),
        ({"tasks": ("digits-1e-2",), "nowcasters": ("best",)}, "'best' cannot be used"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str):
    settings: dict[str, Any] = {"nowcasters": ("none",), "output": tmp_path, **options}
    with pytest.raises(UsageError, match=message):
        evaluate(Evaluate(**settings))


def test_an_export_is_a_nowcaster_with_its_record(trained: Path, scores: Path, tmp_path: Path):
    path = export(
        Export(
            nowcaster=trained,
            name="ours",
            output=tmp_path / "params",
            evaluation=(scores / "summary.csv",),
            default_horizon=7,
        )
    )
    before, after = wnn_jax.load(trained), wnn_jax.load(path)
    assert isinstance(after, wnn_jax.nowcasters.AdaptiveLinear)
    assert after.default_horizon == 7
    record = json.loads(path.with_suffix(".json").read_text())
    assert record == after.record
    assert record["scores"] == {"nowcaster": read_summary(scores / "summary.csv")["nowcaster"]}
    history = [{"w": np.linspace(0, 1, 6, dtype=np.float32) * time**0.5} for time in range(5)]
    np.testing.assert_array_equal(before(history, {"w": "dense"}, 7)["w"], after(history, {"w": "dense"}, None)["w"])
    assert {file.name for file in path.parent.iterdir()} == {"ours.npz", "ours.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Ours!"}, "--name 'Ours!' must be of lower-case letters"),
        ({"nowcaster": Path("missing.npz")}, r"--nowcaster missing\.npz cannot be used"),
        ({"default_horizon": 41}, "--default-horizon.*from 1 to 40"),
    ],
)
def test_bad_exports_are_named(trained: Path, scores: Path, tmp_path: Path, options: dict[str, Any], message: str):
    settings: dict[str, Any] = {"nowcaster": trained, "name": "ours", "evaluation": (scores / "summary.csv",)}
    with pytest.raises(UsageError, match=message):
        export(Export(output=tmp_path, **(settings | options)))
    assert not list(tmp_path.iterdir())


def test_scores_are_those_of_the_same_file(trained: Path, scores: Path, tmp_path: Path):
    theirs = tmp_path / "theirs.npz"
    theirs.write_bytes(trained.read_bytes())
    with pytest.raises(UsageError, match="--evaluation has no arm of 'theirs', only: linear, none, nowcaster"):
        export(Export(nowcaster=theirs, name="ours", output=tmp_path / "params", evaluation=(scores / "summary.csv",)))
