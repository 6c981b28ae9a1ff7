import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from tests.lab.conftest import TINY
from tests.lab.forecasting.conftest import KIND
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting import train as train_module
from wnn_jax.lab.forecasting.families import SPLITS, TEST_SPLITS
from wnn_jax.lab.forecasting.forecasting_task import ForecastingTask
from wnn_jax.lab.forecasting.kinds import KINDS, NowcasterKind
from wnn_jax.lab.forecasting.train import Train, train
from wnn_jax.lab.forecasting.trajectories import load_trajectories, save_trajectory
from wnn_jax.lab.jobs import lock

Options = Callable[..., Train]


def params_of(folder: Path) -> Any:
    nowcaster: Any = wnn_jax.load(folder / "nowcaster.npz")
    return dict(nowcaster.params)


def record_of(folder: Path) -> dict[str, Any]:
    nowcaster: Any = wnn_jax.load(folder / "nowcaster.npz")
    return dict(nowcaster.record)


def assert_same(folder: Path, expected: Path) -> None:
    assert_trees_equal(params_of(folder), params_of(expected))
    assert record_of(folder) == record_of(expected)


def changed_collection(collection: Path, folder: Path, splits: tuple[str, ...]) -> Path:
    """A copy in which the runs of some splits have other weights: a random walk."""
    shutil.copytree(collection, folder)
    for run in load_trajectories([folder]):
        if run.split in splits:
            steps = np.random.default_rng(run.index).normal(size=run.snapshots.shape)
            walk = np.cumsum(steps, axis=0).astype(np.float32)
            snapshots = [{leaf.name: row[leaf.columns].reshape(leaf.shape) for leaf in run.leaves} for row in walk]
            save_trajectory(folder, run.family, run.index, snapshots, run.losses, {"loss": 1.0})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_nowcaster_of_every_kind_is_trained(collection: Path, tmp_path: Path, tiny_train: Options, kind: str):
    nowcaster: Any = train(tiny_train(tmp_path, kind=kind))
    assert_trees_equal(params_of(tmp_path), dict(nowcaster.params))
    metrics = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in metrics] == ["step", "10", "20", "30"]
    assert metrics[0].startswith("step,train_loss,forecast error,runs,architectures,")
    losses, errors = ([float(row.split(",")[column]) for row in metrics[1:]] for column in (1, 2))
    assert losses[-1] < losses[0]
    record = json.loads(json.dumps(record_of(tmp_path), allow_nan=False))
    assert record == nowcaster.record
    assert record["kind"] == kind
    assert record["validation"]["forecast error"] == pytest.approx(min(errors), rel=1e-5)
    assert record["test"].keys() == record["validation"].keys() - {"step", "train_loss"}
    runs = load_trajectories([collection])
    for split in SPLITS:
        assert record["data"][split]["seeds"] == {TINY: [run.index for run in runs if run.split == split]}
        assert record["data"][split]["architectures"]


def interrupt_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ForecastingTask.batch

    def interrupted(self: ForecastingTask, seed: int, number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return original(self, seed, number)

    monkeypatch.setattr(ForecastingTask, "batch", interrupted)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("step", [23, 5])
def test_an_interrupted_training_run_goes_on_to_the_same_nowcaster(
    trained: Path, tmp_path: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch, step: int
):
    with monkeypatch.context() as patch:
        interrupt_before(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_train(tmp_path))
    assert (tmp_path / "nowcaster.npz").exists() == (step >= 10)
    for _ in range(2):  # The second time nothing is left to do.
        train(tiny_train(tmp_path))
        assert_same(tmp_path, trained)


def change_kind(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    kinds: dict[str, NowcasterKind] = {**KINDS, KIND: dataclasses.replace(KINDS[KIND], **changes)}
    monkeypatch.setattr(train_module, "KINDS", kinds)


@pytest.fixture
def _ascent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every step a step in the wrong direction, so that the first nowcaster stays the best."""
    change_kind(monkeypatch, optimizer=lambda learning_rate, num_steps: optax.sgd(-learning_rate))


@pytest.mark.usefixtures("_ascent")
def test_the_best_nowcaster_is_kept_through_an_interruption(
    tmp_path: Path, trained: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch
):
    changes = {"learning_rate": 0.01, "num_steps": 12, "validate_every": 2}
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    train(tiny_train(undisturbed, **changes))
    assert record_of(undisturbed)["validation"]["step"] == 2
    with monkeypatch.context() as patch:
        interrupt_before(9, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_train(resumed, **changes))
    train(tiny_train(resumed, **changes))
    assert_same(resumed, undisturbed)
    # The file of another nowcaster is not taken for the best one.
    shutil.copy(trained / "nowcaster.npz", resumed)
    with pytest.raises(UsageError, match=r"nowcaster\.npz is not the nowcaster that this training run kept at step 2"):
        train(tiny_train(resumed, **changes))


def test_selection_never_sees_the_test_runs(collection: Path, trained: Path, tmp_path: Path, tiny_train: Options):
    changed = changed_collection(collection, tmp_path / "changed", TEST_SPLITS)
    train(tiny_train(tmp_path / "output", collection=(changed,)))
    assert_trees_equal(params_of(tmp_path / "output"), params_of(trained))
    before, after = record_of(trained), record_of(tmp_path / "output")
    assert after["validation"] == before["validation"]
    assert after["test"]["forecast error"] != before["test"]["forecast error"]
    with pytest.raises(UsageError, match=r"another training run: test runs was [0-9a-f]{16} \(2 runs\) and is"):
        train(tiny_train(trained, collection=(changed,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 31}, r"another training run: num_steps was 30 and is 31\. Go on with the same options"),
        ({"seed": 1, "num_weights": 8}, r"num_weights was 16 and is 8; seed was 0 and is 1"),
        ({"kind": "wnn"}, "kind was wnn-plus and is wnn"),
    ],
)
def test_what_is_different_is_named(trained: Path, tiny_train: Options, changes: dict[str, Any], message: str):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(UsageError, match=message):
        train(tiny_train(trained, **changes))
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds a training run of another version, or training\.json is damaged .*; choose another folder"),
        ("[]", r"or training\.json is damaged .*; choose another folder"),
        ('{"min_stride": 2}', "another training run: min_stride was 2 and is None; "),
    ],
)
def test_a_folder_of_another_version_is_not_overwritten(
    trained: Path, tmp_path: Path, tiny_train: Options, content: str | None, message: str
):
    folder = shutil.copytree(trained, tmp_path / "older")
    (folder / "training.json").unlink()
    if content is not None:
        (folder / "training.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        train(tiny_train(folder))
    assert_same(folder, trained)


def test_one_process_trains_in_a_folder(tmp_path: Path, tiny_train: Options):
    with lock(tmp_path / "training.json"), pytest.raises(UsageError, match="another process trains there"):
        train(tiny_train(tmp_path))


def test_training_stops_when_nothing_improves(tmp_path: Path, tiny_train: Options):
    train(tiny_train(tmp_path, learning_rate=1e-30, validate_every=2, patience=2))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) < 10


def test_a_training_run_that_diverges_at_once_is_an_error(
    tmp_path: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch
):
    init = KINDS[KIND].init
    change_kind(monkeypatch, init=lambda key, roles: jax.tree.map(lambda x: x * np.nan, init(key, roles)))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"--learning-rate 0\.003: the training run diverged before the first"):
            train(tiny_train(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0 must be positive"),
        ({"learning_rate": -1.0}, r"--learning-rate -1\.0 must be positive"),
        ({"kind": "other"}, "--kind 'other' is not known; choose from wnn, wnn-plus, pooled-linear"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, tiny_train: Options, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        train(tiny_train(tmp_path, **options))
    assert not list(tmp_path.iterdir())
