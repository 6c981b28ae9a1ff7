import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from tests.meta.conftest import TINY
from wnn_jax.meta import train as train_module
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.objectives import OBJECTIVES
from wnn_jax.meta.train import Train, train
from wnn_jax.meta.trajectories import Collection
from wnn_jax.meta.windows import WindowSampler
from wnn_jax.nowcasters import WNN, AdaptiveLinear, WNNPlus

KINDS = {"wnn": WNN, "wnn-plus": WNNPlus, "adaptive-linear": AdaptiveLinear}


plot_errors = train_module._plot_errors


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_VALIDATION_WINDOWS", 4)
    # It forecasts every held-out run with three nowcasters, which takes longer than a tiny training.
    monkeypatch.setattr(train_module, "_plot_errors", lambda *_: None)


def tiny(collection: Path, output: Path, **changes: Any) -> Train:
    settings: dict[str, Any] = {
        "kind": "adaptive-linear",
        "num_steps": 30,
        "windows_per_role": 4,
        "num_weights": 16,
        "validate_every": 10,
    }
    return Train(collection=(collection,), output=output, **(settings | changes))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_nowcaster_of_every_kind_is_trained(collection: Path, tmp_path: Path, kind: str):
    trained = train(tiny(collection, tmp_path, kind=kind))
    loaded = wnn_jax.load(tmp_path / "nowcaster.npz")
    assert isinstance(trained, KINDS[kind])
    assert isinstance(loaded, KINDS[kind])
    assert_trees_equal(dict(loaded.params), dict(trained.params))
    metrics = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in metrics] == ["step", "10", "20", "30"]
    losses = [float(row.split(",")[1]) for row in metrics[1:]]
    assert losses[-1] < losses[0]
    record = json.loads(json.dumps(loaded.record, allow_nan=False))
    assert record["kind"] == kind
    runs = {trajectory.index: trajectory for trajectory in Collection(collection).trajectories()}
    for split in ("train", "validation", "held-out architecture"):
        assert record["data"][split]["seeds"] == {TINY: [i for i, run in runs.items() if run.split == split]}
        assert record["data"][split]["architectures"]


def test_its_errors_are_drawn(collection: Path, tmp_path: Path, wnn: WNN):
    held_out = [t for t in Collection(collection).trajectories() if t.split == "validation"]
    plot_errors(tiny(collection, tmp_path), wnn, held_out[:1])
    assert (tmp_path / "forecast-errors.png").read_bytes().startswith(b"\x89PNG")


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = WindowSampler.batches

    def interrupted(self: WindowSampler, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(self, *args, **kwargs)):
            if number == batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(WindowSampler, "batches", interrupted)


@pytest.mark.parametrize("batches", [10, 13])
def test_an_interrupted_training_goes_on_to_the_same_network(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
):
    undisturbed = train(tiny(collection, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        interrupt_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(collection, tmp_path / "resumed"))
    assert not (tmp_path / "resumed" / "nowcaster.npz").exists()
    resumed = train(tiny(collection, tmp_path / "resumed", resume=True))
    assert isinstance(undisturbed, AdaptiveLinear)
    assert isinstance(resumed, AdaptiveLinear)
    assert_trees_equal(dict(resumed.params), dict(undisturbed.params))


def test_what_is_there_is_not_overwritten(collection: Path, tmp_path: Path):
    train(tiny(collection, tmp_path, num_steps=10))
    with pytest.raises(UsageError, match=r"has checkpoints\. Go on with --resume, or choose another folder"):
        train(tiny(collection, tmp_path, num_steps=10))
    with pytest.raises(UsageError, match="had other settings"):
        train(tiny(collection, tmp_path, num_steps=20, resume=True))


def test_training_stops_when_nothing_improves(collection: Path, tmp_path: Path):
    train(tiny(collection, tmp_path, num_steps=1000, learning_rate=1e-30, validate_every=2, patience=2))
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert len(rows) < 30


@pytest.mark.parametrize("split", ["train", "validation", "held-out architecture"])
def test_a_missing_split_is_named(collection: Path, tmp_path: Path, split: str):
    folder = tmp_path / "collection"
    shutil.copytree(collection, folder)
    for trajectory in Collection(folder).trajectories():
        if trajectory.split == split:
            trajectory.file.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match=f"has no finished run for {split}; collect more"):
        train(tiny(folder, tmp_path / "output"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0 must be positive"),
        ({"learning_rate": -1.0}, r"--learning-rate -1\.0 must be positive"),
        ({"min_stride": 5, "max_stride": 4}, "--min-stride 5 must not exceed --max-stride 4"),
    ],
)
def test_bad_options_are_named(collection: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        train(tiny(collection, tmp_path, **options))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_errors_are_those_of_the_nowcaster(collection: Path, kind: str):
    objective = OBJECTIVES[kind]
    roles = ("bias", "dense")
    runs = [t for t in Collection(collection).trajectories() if t.split == "train"]
    draw = WindowSampler(runs, roles, objective.statistics, num_weights=64, min_stride=1, max_stride=1, seed=0)
    windows = [draw(index) for index in range(4)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *windows)
    params = objective.init(jax.random.key(0), roles)
    errors = jax.device_get(objective.errors(params, batch, roles))
    nowcaster = objective.nowcaster(params, {})
    # The bias of the hidden layer has 64 weights and is drawn whole: the nowcaster sees the same tensor.
    for number in range(0, 4, 2):
        if len(np.unique(batch.history[number, 0])) < 64:
            continue
        history = [{"bias": snapshot} for snapshot in batch.history[number]]
        forecast = nowcaster(history, {"bias": "bias"}, None if kind == "wnn" else 5)["bias"]
        actual, last = batch.targets[number, 4], batch.history[number, -1]
        expected = np.abs(forecast - actual).sum() / np.abs(last - actual).sum()
        np.testing.assert_allclose(errors[number, 4], expected, rtol=1e-4)
    known = np.isfinite(errors)
    assert (known <= batch.is_known).all()
    assert known[:, 4].all()
    if kind == "wnn":
        assert known.sum() == len(windows)


def test_settings_have_defaults_for_all_but_the_folders():
    required = [field.name for field in dataclasses.fields(Train) if field.default is dataclasses.MISSING]
    assert required == ["collection", "output"]
