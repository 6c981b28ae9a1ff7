import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.meta.conftest import NUM_RUNS, TINY, tiny_family
from wnn_jax.meta.collect import Collect, collect
from wnn_jax.meta.datasets import load_dataset
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.program import Program
from wnn_jax.meta.trajectories import Collection


def tiny(output: Path, **changes: Any) -> Collect:
    settings: dict[str, Any] = {"family": TINY, "num_runs": NUM_RUNS, "num_processes": 1}
    return Collect(output=output, **(settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_collection_has_all_runs_of_all_splits(collection: Path):
    trajectories = Collection(collection).trajectories()
    assert [trajectory.index for trajectory in trajectories] == list(range(NUM_RUNS))
    assert {trajectory.split for trajectory in trajectories} == {"train", "validation", "held-out architecture"}
    for trajectory in trajectories:
        trajectory.verify()
        assert trajectory.task == tiny_family().task(trajectory.index)
        assert trajectory.split == tiny_family().split(trajectory.index)
        assert trajectory.num_snapshots == 24
        assert trajectory.losses[-1] < trajectory.losses[0]
        assert np.any(trajectory.snapshots[0] != trajectory.snapshots[-1])


def test_training_and_validation_runs_are_disjoint(collection: Path):
    by_split: dict[str, set[int]] = {}
    for trajectory in Collection(collection).trajectories():
        by_split.setdefault(trajectory.split, set()).add(trajectory.index // tiny_family().group_size)
    groups = [group for groups in by_split.values() for group in groups]
    assert len(groups) == len(set(groups))


def test_machines_can_share_the_work(collection: Path, tmp_path: Path):
    collect(tiny(tmp_path, first_run=3, num_runs=NUM_RUNS - 3))
    assert Collection(tmp_path).finished() == set(range(3, NUM_RUNS))
    collect(tiny(tmp_path, num_runs=3))
    assert contents(tmp_path) == contents(collection)


def test_an_interrupted_collection_goes_on(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, calls = Program.run, []

    def interrupted(self: Program, *args: Any) -> Any:
        calls.append(args)
        for number, step in enumerate(run(self, *args)):
            if len(calls) == 4 and number == 10:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Program, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(Collection(tmp_path).finished()) == 3
    collect(tiny(tmp_path))
    assert contents(tmp_path) == contents(collection)
    assert len(calls) == NUM_RUNS + 1
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


PROGRAM = """
import sys
from pathlib import Path
import wnn_jax.meta.tasks as tasks
from tests.meta.conftest import TINY, tiny_family
tasks.FAMILIES = {TINY: tiny_family()}
from wnn_jax.meta.collect import Collect, collect
collect(Collect(output=Path(sys.argv[1]), family=TINY, num_runs=6, num_processes=1))
"""


def test_a_killed_collection_goes_on(collection: Path, tmp_path: Path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment)
    while process.poll() is None and len(list(tmp_path.glob("run-*.json"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(Collection(tmp_path).finished()) <= NUM_RUNS
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, check=True)
    expected = contents(collection)
    # The process has one device, where these tests have eight; that may change the last bit of a sum.
    assert Collection(tmp_path).finished() == set(range(NUM_RUNS))
    for trajectory, other in zip(
        Collection(tmp_path).trajectories(), Collection(collection).trajectories(), strict=True
    ):
        trajectory.verify()
        np.testing.assert_allclose(trajectory.snapshots, other.snapshots, rtol=1e-3, atol=1e-4)
    assert expected.keys() <= contents(tmp_path).keys()


def test_processes_side_by_side(tmp_path: Path):
    # The digits family as it is, because a spawned process does not know the tiny one; two of its runs.
    collect(Collect(output=tmp_path, family="digits", first_run=0, num_runs=4, num_processes=2))
    assert len(Collection(tmp_path).trajectories()) == 4


def test_runs_trained_together_are_those_trained_alone():
    family = tiny_family()
    tasks = [family.task(index) for index in (2, 3)]
    program = Program(tasks[0], load_dataset("digits", Path()))
    together = list(program.run_together(tasks))
    for member, task in enumerate(tasks):
        alone = list(program.run(task))
        assert len(alone) == len(together) == 24
        for (params, loss), (all_params, losses) in zip(alone, together, strict=True):
            np.testing.assert_allclose(losses[member], loss, rtol=1e-3)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(y[member], x, rtol=1e-2, atol=1e-4),  # noqa: B023
                params,
                all_params,
            )


def test_a_budget_ends_a_collection(tmp_path: Path):
    collect(tiny(tmp_path, budget=1e-9))
    assert Collection(tmp_path).finished() == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_runs": 0}, "--num-runs 0 must be positive"),
        ({"first_run": -1}, "--first-run -1 must not be negative"),
        ({"budget": -1.0}, r"--budget -1\.0 must be positive"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
        ({"family": "huge"}, "--family 'huge' is not known"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        collect(tiny(tmp_path, **options))


def test_a_missing_data_set_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no .* folder prepared by TensorFlow Datasets"):
        collect(Collect(output=tmp_path / "runs", family="small", num_runs=1, num_processes=1, data_dir=tmp_path))
