import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.lab.conftest import NUM_RUNS, TINY, tiny_family
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting import collect as collect_module
from wnn_jax.lab.forecasting.collect import Collect, collect, make_program, train_run, train_runs_together
from wnn_jax.lab.forecasting.collection import Collection, verified_trajectories
from wnn_jax.lab.tasks.families import FAMILIES, SPLITS

# As the collection was made.
pytestmark = pytest.mark.usefixtures("optimized")


def tiny(output: Path, **changes: Any) -> Collect:
    settings: dict[str, Any] = {"family": TINY, "num_runs": NUM_RUNS, "num_processes": 1}
    return Collect(output=output, **(settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_close(folder: Path, other: Path, num_runs: int) -> None:
    """Two collections of the same runs: another number of devices may change the last bit of a sum."""
    trajectories = verified_trajectories([folder])
    assert [trajectory.index for trajectory in trajectories] == list(range(num_runs))
    for trajectory, expected in zip(trajectories, Collection(other).trajectories(), strict=False):
        assert trajectory.settings == expected.settings
        assert trajectory.split == expected.split
        np.testing.assert_allclose(trajectory.snapshots, expected.snapshots, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(trajectory.losses, expected.losses, rtol=1e-3)


def test_a_collection_has_all_runs_of_all_splits(collection: Path):
    trajectories = verified_trajectories([collection])
    assert [trajectory.index for trajectory in trajectories] == list(range(NUM_RUNS))
    assert {trajectory.split for trajectory in trajectories} == set(SPLITS)
    for trajectory in trajectories:
        assert trajectory.settings == tiny_family().settings(trajectory.index)
        assert trajectory.split == tiny_family().split(trajectory.index)
        assert trajectory.num_snapshots == 24
        assert trajectory.losses[-1] < trajectory.losses[0]
        assert 0.2 < trajectory.validation["accuracy"] <= 1
        assert np.any(trajectory.snapshots[0] != trajectory.snapshots[-1])


def test_the_splits_are_disjoint(collection: Path):
    by_split: dict[str, set[int]] = {}
    for trajectory in Collection(collection).trajectories():
        by_split.setdefault(trajectory.split, set()).add(trajectory.index // tiny_family().group_size)
    groups = [group for groups in by_split.values() for group in groups]
    assert len(groups) == len(set(groups))


def test_machines_can_share_the_work(collection: Path, tmp_path: Path):
    collect(tiny(tmp_path, first_run=1, num_runs=3))
    assert Collection(tmp_path).finished() == {1, 2, 3}
    collect(tiny(tmp_path, num_runs=2))
    expected = contents(collection)
    assert Collection(tmp_path).finished() == {0, 1, 2, 3}
    assert all(content == expected[name] for name, content in contents(tmp_path).items())


def test_two_collectors_of_one_folder_make_each_run_once(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds: list[int] = []

    def counted(program: Any, settings: Any) -> Any:
        seeds.append(settings.seed)
        if settings.seed == 0:
            collect(tiny(tmp_path, num_runs=3, budget=1e-3))  # Another one, while the first makes run 0.
        return train_run(program, settings)

    monkeypatch.setattr(collect_module, "train_run", counted)
    collect(tiny(tmp_path, num_runs=4))
    assert sorted(seeds) == [0, 1, 2, 3]
    expected = contents(collection)
    assert all(content == expected[name] for name, content in contents(tmp_path).items())


def test_a_collection_that_another_family_takes_over_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def overtaken(*arguments: Any) -> Any:
        collect(tiny(tmp_path, family="digits", budget=1e-9))
        return train_run(*arguments)

    monkeypatch.setattr(collect_module, "train_run", overtaken)
    with pytest.raises(UsageError, match=r"was given to another family of tasks\. Collect into another folder"):
        collect(tiny(tmp_path, num_runs=4))


def test_an_interrupted_collection_goes_on(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return train_run(*arguments)

    monkeypatch.setattr(collect_module, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny(tmp_path, num_runs=4))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert Collection(tmp_path).finished() == {0, 1}
    collect(tiny(tmp_path, num_runs=4))
    expected = contents(collection)
    assert all(content == expected[name] for name, content in contents(tmp_path).items())
    assert next(calls) == 6
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.slow
def test_processes_side_by_side_make_the_same_collection(collection: Path, tmp_path: Path):
    collect(tiny(tmp_path, num_runs=4, num_processes=2))
    assert_close(tmp_path, collection, num_runs=4)


def test_runs_trained_together_are_those_trained_alone(collection: Path):
    group = [tiny_family().settings(index) for index in (2, 3)]
    program = make_program(group[0].program, Path())
    for run, trajectory in zip(
        train_runs_together(program, group), Collection(collection).trajectories()[2:4], strict=True
    ):
        np.testing.assert_allclose(run.losses, trajectory.losses, rtol=1e-3)
        assert run.validation["loss"] == pytest.approx(trajectory.validation["loss"], rel=1e-2)
        for snapshot, expected in zip(run.snapshots, trajectory.snapshots, strict=True):
            weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(snapshot)])
            np.testing.assert_allclose(weights, expected, rtol=1e-2, atol=1e-4)


def test_a_run_that_diverges_at_its_last_step_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def diverging(*arguments: Any) -> Any:
        run = train_run(*arguments)
        # Training losses are of the parameters before a step: those of the last step are in no loss.
        return run._replace(snapshots=[*run.snapshots[:-1], jax.tree.map(lambda x: x * np.nan, run.snapshots[-1])])

    monkeypatch.setattr(collect_module, "train_run", diverging)
    collect(tiny(tmp_path, num_runs=1))
    assert Collection(tmp_path).finished() == {0}
    assert Collection(tmp_path).trajectories() == []


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
    assert not list(tmp_path.iterdir())


def test_a_collection_that_fails_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").touch()
    output = tmp_path / "runs"
    with pytest.raises(UsageError, match=r"holds no 'cifar10' and no 'tiny_shakespeare' folder"):
        collect(Collect(output=output, family="small", num_runs=1, num_processes=1, data_dir=tmp_path))
    assert not output.exists()


def test_a_collection_whose_first_run_fails_does_not_block_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*arguments: Any) -> Any:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(collect_module, "train_run", failing)
        with pytest.raises(RuntimeError):
            collect(tiny(tmp_path))
    collect(Collect(output=tmp_path, family="digits", budget=1e-9, num_processes=1))
    assert Collection(tmp_path).name == FAMILIES["digits"].name
