import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.lab.conftest import NUM_RUNS, TINY, tiny_family
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting import collect as collect_module
from wnn_jax.lab.forecasting.collect import Collect, collect, train_run
from wnn_jax.lab.forecasting.families import SPLITS
from wnn_jax.lab.forecasting.trajectories import finished_runs, load_trajectories, save_trajectory


def tiny(output: Path, **changes: Any) -> Collect:
    settings: dict[str, Any] = {"family": TINY, "num_runs": NUM_RUNS, "num_processes": 1}
    return Collect(output=output, **(settings | changes))


def assert_equal(folder: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Assert that the runs of a folder are those of another folder."""
    runs = {run.index: run for run in load_trajectories([expected])}
    for run in load_trajectories([folder]):
        assert run.settings == runs[run.index].settings
        np.testing.assert_allclose(run.losses, runs[run.index].losses, tolerance, tolerance)
        np.testing.assert_allclose(run.snapshots, runs[run.index].snapshots, tolerance, tolerance)
        assert tolerance or run.validation == runs[run.index].validation


def test_a_collection_has_all_runs_of_all_splits(collection: Path):
    runs = load_trajectories([collection])
    assert [run.index for run in runs] == list(range(NUM_RUNS))
    assert {run.split for run in runs} == set(SPLITS)
    for run in runs:
        assert len(run.snapshots) == 24
        assert run.losses[-1] < run.losses[0]
        assert 0.2 < (run.validation["accuracy"] or 0) <= 1
        assert np.any(run.snapshots[0] != run.snapshots[-1])
    # A whole group belongs to one split.
    groups = {(run.index // tiny_family().group_size, run.split) for run in runs}
    assert len(groups) == NUM_RUNS // tiny_family().group_size


def test_a_run_is_trained_at_its_own_decaying_learning_rate(collection: Path):
    """The rates of two runs of one program, each as Optax alone trains it."""
    runs = load_trajectories([collection])[:2]
    task = runs[0].settings.task(Path())
    init, gradient = jax.jit(task.init), jax.jit(jax.grad(task.loss, has_aux=True))
    for run in runs:
        settings = run.settings
        decay = optax.cosine_decay_schedule(1.0, settings.num_steps, alpha=settings.final_learning_rate)
        tx = optax.scale_by_adam()
        params, _ = init(jax.random.key(settings.seed))
        opt_state = tx.init(params)
        for step in range(settings.snapshot_every):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), 1), jnp.int32(step))
            updates, opt_state = tx.update(gradient(params, {}, task.batch(settings.seed, step), key)[0], opt_state)
            rate = settings.learning_rate * decay(step)
            params = jax.tree.map(lambda param, update, rate=rate: param - rate * update, params, updates)
        expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        np.testing.assert_allclose(run.snapshots[0], expected, rtol=1e-4, atol=1e-6)


def test_two_collectors_of_one_folder_make_each_run_once(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds: list[int] = []

    def counted(program: Any, settings: Any) -> Any:
        seeds.append(settings.seed)
        if settings.seed == 0:
            collect(tiny(tmp_path, num_runs=4, budget=1e-3))  # Another one, while the first makes run 0.
        return train_run(program, settings)

    monkeypatch.setattr(collect_module, "train_run", counted)
    collect(tiny(tmp_path, num_runs=4))
    assert sorted(seeds) == [0, 1, 2, 3]
    assert_equal(tmp_path, collection)


def test_an_interrupted_collection_goes_on(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return train_run(*arguments)

    monkeypatch.setattr(collect_module, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny(tmp_path, first_run=1, num_runs=3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert finished_runs(tmp_path) == [1]
    collect(tiny(tmp_path, num_runs=4))
    assert finished_runs(tmp_path) == [0, 1, 2, 3]
    assert_equal(tmp_path, collection)
    assert next(calls) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_several_processes_make_the_same_collection(collection: Path, tmp_path: Path):
    collect(tiny(tmp_path, num_runs=4, num_processes=2))
    assert finished_runs(tmp_path) == [0, 1, 2, 3]
    # Another number of devices may change the last bit of a sum.
    assert_equal(tmp_path, collection, tolerance=1e-3)


def test_another_family_does_not_mix_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def overtaken(program: Any, settings: Any) -> Any:
        other = dataclasses.replace(tiny_family(), seed=1)
        save_trajectory(tmp_path, other, 0, [{"a": jnp.zeros(1)}], [1.0], {})
        return train_run(program, settings)

    monkeypatch.setattr(collect_module, "train_run", overtaken)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"holds runs of another task family.*Collect into another folder"):
            collect(tiny(tmp_path, first_run=2, num_runs=4))
    assert finished_runs(tmp_path) == [0, 2, 3]


def test_a_budget_ends_a_collection(tmp_path: Path):
    collect(tiny(tmp_path, budget=1e-9))
    assert finished_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_runs": 0}, "--num-runs 0 must be positive"),
        ({"first_run": -1}, "--first-run -1 must not be negative"),
        ({"budget": -1.0}, r"--budget -1\.0 must be positive"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
        ({"family": "huge"}, "--family 'huge' is not known"),
        ({"family": "small", "data_dir": Path("missing")}, "missing"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        collect(tiny(tmp_path / "runs", **options))
    assert not list(tmp_path.iterdir())
