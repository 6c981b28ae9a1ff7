import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from tests.lab.conftest import TINY, process_environment
from tests.lab.forecasting.conftest import NUM_EVALUATION_WINDOWS
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting import train as train_module
from wnn_jax.lab.forecasting.collection import Collection
from wnn_jax.lab.forecasting.forecasting import Forecasting
from wnn_jax.lab.forecasting.objectives import OBJECTIVES
from wnn_jax.lab.forecasting.train import Train, train
from wnn_jax.lab.tasks.families import SPLITS, TEST_SPLITS

Options = Callable[..., Train]
plot_errors = train_module._plot_errors


def params_of(folder: Path) -> Any:
    nowcaster: Any = wnn_jax.load(folder / "nowcaster.npz")
    return dict(nowcaster.params)


def record_of(folder: Path) -> dict[str, Any]:
    nowcaster: Any = wnn_jax.load(folder / "nowcaster.npz")
    return dict(nowcaster.record)


def changed_collection(collection: Path, folder: Path, splits: tuple[str, ...]) -> Path:
    """A copy in which the runs of some splits are of other weights: a random walk."""
    shutil.copytree(collection, folder)
    copy = Collection(folder)
    for trajectory in copy.trajectories():
        if trajectory.split in splits:
            steps = np.random.default_rng(trajectory.index).normal(size=trajectory.snapshots.shape)
            walk = np.cumsum(steps, axis=0).astype(np.float32)
            snapshots = [
                {leaf.name: row[leaf.columns].reshape(leaf.shape) for leaf in trajectory.leaves} for row in walk
            ]
            copy.save(
                trajectory.index,
                trajectory.settings,
                trajectory.split,
                snapshots,
                trajectory.losses,
                trajectory.validation,
            )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptive-linear", "pooled", "wnn", "wnn-plus"])
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
    runs = {trajectory.index: trajectory for trajectory in Collection(collection).trajectories()}
    for split in SPLITS:
        assert record["data"][split]["seeds"] == {TINY: [i for i, run in runs.items() if run.split == split]}
        assert record["data"][split]["architectures"]


@pytest.mark.slow
def test_its_errors_are_drawn(collection: Path, tmp_path: Path, tiny_train: Options, wnn: Any):
    runs = [trajectory for trajectory in Collection(collection).trajectories() if trajectory.split == "validation"]
    plot_errors(tiny_train(tmp_path), wnn, runs[:1])
    assert (tmp_path / "forecast-errors.png").read_bytes().startswith(b"\x89PNG")


def interrupt_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Forecasting.batch

    def interrupted(self: Forecasting, seed: int, number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return original(self, seed, number)

    monkeypatch.setattr(Forecasting, "batch", interrupted)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("step", [5, 10, 23])
def test_an_interrupted_training_goes_on_to_the_same_nowcaster(
    trained: Path, tmp_path: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch, step: int
):
    with monkeypatch.context() as patch:
        interrupt_before(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_train(tmp_path))
    assert (tmp_path / "nowcaster.npz").exists() == (step >= 10)
    train(tiny_train(tmp_path))
    assert_trees_equal(params_of(tmp_path), params_of(trained))
    assert record_of(tmp_path) == record_of(trained)


@pytest.fixture
def _ascent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every step a step in the wrong direction, so that the first nowcaster stays the best."""
    objective_class = type(OBJECTIVES["adaptive-linear"])
    monkeypatch.setattr(objective_class, "optimizer", lambda self, learning_rate, num_steps: optax.sgd(-learning_rate))


@pytest.mark.usefixtures("_ascent")
def test_the_best_nowcaster_is_kept_through_an_interruption(
    tmp_path: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch
):
    changes = {"learning_rate": 0.1, "num_steps": 12, "validate_every": 2}
    train(tiny_train(tmp_path / "undisturbed", **changes))
    assert record_of(tmp_path / "undisturbed")["validation"]["step"] == 2
    with monkeypatch.context() as patch:
        interrupt_before(9, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_train(tmp_path / "resumed", **changes))
    train(tiny_train(tmp_path / "resumed", **changes))
    assert_trees_equal(params_of(tmp_path / "resumed"), params_of(tmp_path / "undisturbed"))
    assert record_of(tmp_path / "resumed") == record_of(tmp_path / "undisturbed")


PROGRAM = f"""
import sys
from pathlib import Path
from wnn_jax.lab.forecasting import forecasting, train as module
forecasting._EVALUATION_WINDOWS_PER_ROLE = {NUM_EVALUATION_WINDOWS}
module._plot_errors = lambda *_: None
for output in sys.argv[2:]:
    module.train(module.Train(
        collection=(Path(sys.argv[1]),), output=Path(output), num_steps=60, windows_per_role=4, num_weights=16,
        validate_every=2,
    ))
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_nowcaster(collection: Path, tmp_path: Path):
    resumed, undisturbed = tmp_path / "resumed", tmp_path / "undisturbed"
    command = [sys.executable, "-c", PROGRAM, str(collection), str(resumed)]
    process = subprocess.Popen(command, env=process_environment())
    while process.poll() is None and not list(resumed.glob("checkpoints/stage-0/[0-9]*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "test" not in record_of(resumed)
    subprocess.run([*command, str(undisturbed)], env=process_environment(), check=True)
    assert_trees_equal(params_of(resumed), params_of(undisturbed))
    assert record_of(resumed) == record_of(undisturbed)


def test_selection_never_sees_the_test_runs(collection: Path, trained: Path, tmp_path: Path, tiny_train: Options):
    changed = changed_collection(collection, tmp_path / "changed", TEST_SPLITS)
    train(tiny_train(tmp_path / "output", collection=(changed,)))
    assert_trees_equal(params_of(tmp_path / "output"), params_of(trained))
    before, after = record_of(trained), record_of(tmp_path / "output")
    assert after["validation"] == before["validation"]
    assert after["test"]["forecast error"] != before["test"]["forecast error"]


def test_the_same_command_ends_in_the_same(trained: Path, tmp_path: Path, tiny_train: Options):
    shutil.copytree(trained, tmp_path / "again")
    train(tiny_train(tmp_path / "again"))
    assert_trees_equal(params_of(tmp_path / "again"), params_of(trained))
    assert record_of(tmp_path / "again") == record_of(trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 31}, r"holds another training: settings\.num_steps was 30 and is 31\. Go on with the options"),
        ({"seed": 1}, r"settings\.seed was 0 and is 1"),
        ({"num_weights": 8}, r"task\.num_weights was 16 and is 8"),
        ({"average": True}, r"task\.average was False and is True"),
        ({"kind": "wnn"}, r"task\.objective was .* and is WNNObjective"),
    ],
)
def test_what_is_different_is_named(trained: Path, tiny_train: Options, changes: dict[str, Any], message: str):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(UsageError, match=message):
        train(tiny_train(trained, **changes))
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_a_nowcaster_of_running_means_is_another_one(trained: Path, tmp_path: Path, tiny_train: Options):
    train(tiny_train(tmp_path, average=True))
    own, other = record_of(tmp_path), record_of(trained)
    assert own["settings"] == {**other["settings"], "average": True}
    assert own["data"] == other["data"]
    assert own["validation"]["forecast error"] != other["validation"]["forecast error"]
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, map(params_of, (tmp_path, trained))), strict=True))


def test_another_collection_is_noticed(collection: Path, trained: Path, tmp_path: Path, tiny_train: Options):
    changed = changed_collection(collection, tmp_path / "changed", ("validation",))
    with pytest.raises(UsageError, match=r"another training: collection\.validation\.sha256 was [0-9a-f.]+ and is"):
        train(tiny_train(trained, collection=(changed,)))


def test_a_folder_of_an_older_version_is_not_overwritten(trained: Path, tmp_path: Path, tiny_train: Options):
    shutil.copytree(trained, tmp_path / "older")
    (tmp_path / "older" / "training.json").unlink()
    with pytest.raises(UsageError, match="holds a training of another version of wnn_jax; choose another folder"):
        train(tiny_train(tmp_path / "older"))


@pytest.mark.usefixtures("_ascent")
def test_a_nowcaster_that_was_exchanged_is_noticed(trained: Path, tmp_path: Path, tiny_train: Options):
    changes = {"learning_rate": 0.1, "num_steps": 6, "validate_every": 2}
    train(tiny_train(tmp_path, **changes))
    (tmp_path / "nowcaster.npz").write_bytes((trained / "nowcaster.npz").read_bytes())
    with pytest.raises(UsageError, match=r"nowcaster\.npz is not the nowcaster that this training kept at step"):
        train(tiny_train(tmp_path, **changes))


def test_training_stops_when_nothing_improves(tmp_path: Path, tiny_train: Options):
    train(tiny_train(tmp_path, num_steps=1000, learning_rate=1e-30, validate_every=2, patience=2))
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert len(rows) < 30


def test_a_training_that_diverges_at_once_is_an_error(
    tmp_path: Path, tiny_train: Options, monkeypatch: pytest.MonkeyPatch
):
    objective: Any = OBJECTIVES["adaptive-linear"]
    init = type(objective).init
    monkeypatch.setattr(type(objective), "init", lambda *args: jax.tree.map(lambda x: x * np.nan, init(*args)))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"--learning-rate 0\.003: the training diverged before the first"):
            train(tiny_train(tmp_path))


def test_a_damaged_run_is_named(collection: Path, tmp_path: Path, tiny_train: Options):
    shutil.copytree(collection, tmp_path / "damaged")
    array = tmp_path / "damaged" / "run-00004.npy"
    array.write_bytes(array.read_bytes()[:-4] + b"0000")
    with pytest.raises(UsageError, match=r"run-00004\.npy is damaged"):
        train(tiny_train(tmp_path / "output", collection=(tmp_path / "damaged",)))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_split_is_named(collection: Path, tmp_path: Path, tiny_train: Options, split: str):
    folder = tmp_path / "collection"
    shutil.copytree(collection, folder)
    for trajectory in Collection(folder).trajectories():
        if trajectory.split == split:
            trajectory.file.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match=f"has no finished run for '{split}'; collect more"):
        train(tiny_train(tmp_path / "output", collection=(folder,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0 must be positive"),
        ({"learning_rate": -1.0}, r"--learning-rate -1\.0 must be positive"),
        ({"min_stride": 5, "max_stride": 4}, "--min-stride 5 must not exceed --max-stride 4"),
        ({"kind": "other"}, "--kind 'other' is not known; choose from wnn, wnn-plus, adaptive-linear"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, tiny_train: Options, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        train(tiny_train(tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_settings_have_defaults_for_all_but_the_folders():
    required = [field.name for field in dataclasses.fields(Train) if field.default is dataclasses.MISSING]
    assert required == ["collection", "output"]
