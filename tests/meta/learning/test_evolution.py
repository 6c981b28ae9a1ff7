import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.helpers import assert_trees_equal
from tests.meta.conftest import tiny_family
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.learning import evolve as evolve_module
from wnn_jax.meta.learning.evolution import Gain, Search, differences
from wnn_jax.meta.learning.evolve import Evolve, ShortTrainings, evolve
from wnn_jax.nowcasters import LearnedDrift

START = {"a": jnp.zeros(2), "b": jnp.zeros([1])}


class Quadratic:
    """A noisy one with its minimum at 1, which may be interrupted."""

    def __init__(self, last_generation: int | None = None) -> None:
        self.last_generation = last_generation

    def loss(self, solution: Any) -> float:
        return 0.02 * float(sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(solution)))

    def losses(self, generation: int, members: Sequence[Any]) -> np.ndarray:
        if generation == self.last_generation:
            raise KeyboardInterrupt
        noise = np.random.default_rng(generation).normal(0, 3e-3, len(members))
        return np.array([self.loss(member) for member in members]) + noise

    def validate(self, solution: Any) -> Gain:
        gain = self.loss(START) - self.loss(solution)
        return Gain(gain, gain, gain, 2)


def small_search(**changes: Any) -> Search:
    settings: dict[str, Any] = {"num_pairs": 4, "std": 0.1, "learning_rate": 0.1, "generations": 24}
    return Search(**(settings | changes))


# The search


def test_a_search_improves(tmp_path: Path):
    found = small_search(validate_every=6).run(Quadratic(), START, tmp_path / "search.npz")
    assert found.validation.mean > 0.8 * Quadratic().loss(START)
    assert found.validation.mean == pytest.approx(Quadratic().validate(found.best).mean)
    assert [row.generation for row in found.rows if row.validation] == [6, 12, 18, 24]
    assert found.rows[-1].trainings == 24 * 8


class Ascent(Quadratic):
    """Says the opposite of what a validation finds."""

    def losses(self, generation: int, members: Sequence[Any]) -> np.ndarray:
        return -super().losses(generation, members)


def test_where_nothing_is_better_the_start_is_kept(tmp_path: Path):
    found = small_search(generations=6).run(Ascent(), START, tmp_path / "search.npz")
    assert_trees_equal(found.best, START)
    assert found.validation.mean == 0
    assert found.rows[-1].norm > 0.1


def test_the_two_of_a_pair_are_on_opposite_sides_of_the_mean(tmp_path: Path):
    seen: list[Any] = []

    class Watched(Quadratic):
        def losses(self, generation: int, members: Sequence[Any]) -> np.ndarray:
            seen.append(members)
            return super().losses(generation, members)

    small_search(generations=1).run(Watched(), START, tmp_path / "search.npz")
    for one, other in zip(seen[0][:4], seen[0][4:], strict=True):
        np.testing.assert_allclose(one["a"], -other["a"], rtol=1e-6)
        assert np.all(one["a"] != 0)


def test_an_interrupted_search_goes_on_to_the_same_solution(tmp_path: Path):
    search = small_search(generations=6, validate_every=2)
    undisturbed = search.run(Quadratic(), START, tmp_path / "undisturbed.npz")
    with pytest.raises(KeyboardInterrupt):
        search.run(Quadratic(last_generation=3), START, tmp_path / "search.npz")
    reported: list[int] = []
    resumed = search.run(
        Quadratic(), START, tmp_path / "search.npz", report=lambda found: reported.append(len(found.rows))
    )
    assert reported == [4, 5, 6]
    assert resumed.rows == undisturbed.rows
    assert resumed.validation == undisturbed.validation
    assert_trees_equal((resumed.mean, resumed.best), (undisturbed.mean, undisturbed.best))


def test_no_generation_begins_after_the_deadline(tmp_path: Path):
    found = small_search().run(Quadratic(), START, tmp_path / "search.npz", deadline=0.0)
    assert found.rows == []


def test_a_divergence_is_worse_than_anything_finite():
    first, second = np.array([1.0, np.nan, 1.0, np.inf, 5.0, 0.2]), np.array([1.02, 9.0, np.nan, np.nan, 1.0, 0.1])
    np.testing.assert_allclose(differences(first, second, 0.5), [-0.02, 0.5, -0.5, 0.0, 0.5, 0.1])


def test_the_interval_of_a_gain_is_that_of_student():
    gain = Gain.of([0.01, 0.02, 0.03])
    assert gain.mean == pytest.approx(0.02)
    # Half of it: 4.3027 (the 97.5 % quantile of t with 2 degrees of freedom) times 0.01 / sqrt(3).
    assert (gain.low, gain.high) == pytest.approx((0.02 - 0.02484, 0.02 + 0.02484), abs=1e-5)
    assert gain.runs == 3


# Whole trainings


@pytest.fixture(autouse=True)
def _one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs of one network, so that one program is compiled."""
    family = dataclasses.replace(tiny_family(), name="short", datasets={"digits": ("mlp-64",)})
    monkeypatch.setattr(evolve_module, "SHORT", family)


@pytest.fixture
def tiny_evolve() -> Callable[..., Evolve]:
    def options(output: Path, **changes: Any) -> Evolve:
        settings: dict[str, Any] = {
            "generations": 2,
            "num_pairs": 1,
            "lengths": (40,),
            "validate_every": 1,
            "num_validation_runs": 2,
            "num_test_runs": 2,
            "num_means": 2,
            "std": 0.5,
            "num_processes": 1,
        }
        return Evolve(output=output, **(settings | changes))

    return options


@pytest.mark.slow
def test_a_drift_is_evolved(tmp_path: Path, tiny_evolve: Callable[..., Evolve]):
    nowcaster = evolve(tiny_evolve(tmp_path))
    loaded: Any = wnn_jax.load(tmp_path / "nowcaster.npz")
    assert isinstance(loaded, LearnedDrift)
    assert_trees_equal(loaded.params, nowcaster.params)
    record = json.loads(json.dumps(loaded.record, allow_nan=False))
    assert record == nowcaster.record
    assert (record["generations"], record["trainings"]) == (2, 4)
    assert record["settings"]["std"] == 0.5
    assert record["test"]["low"] <= record["test"]["mean"] <= record["test"]["high"]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[0] == "generation,trainings,spread,norm,mean,low,high,runs"
    assert len(rows) == 3
    # Called again, nothing is left to do but the score.
    before = (tmp_path / "search.npz").stat().st_mtime_ns
    assert evolve(tiny_evolve(tmp_path)).record == record
    assert (tmp_path / "search.npz").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds another training: settings\.std was 0\.5 and is 0\.1"):
        evolve(tiny_evolve(tmp_path, std=0.1))


@pytest.fixture
def trainings(tmp_path: Path, tiny_evolve: Callable[..., Evolve]) -> Callable[..., ShortTrainings]:
    def make(run: Any, **changes: Any) -> ShortTrainings:
        options = tiny_evolve(tmp_path, **changes)
        start = LearnedDrift.init(jax.random.key(0), num_means=options.num_means)
        return ShortTrainings(options, evolve_module.SHORT, start, run)

    return make


def test_a_pair_trains_the_same_and_no_other_does(trainings: Callable[..., ShortTrainings]):
    jobs: list[Any] = []

    def run(given: Sequence[Any]) -> Any:
        jobs.extend(given)
        return [(job, float(job.number)) for job in given]

    objective = trainings(run)
    for generation in (0, 1):
        members = [objective.start] * 4
        np.testing.assert_array_equal(objective.losses(generation, members), [0, 1, 2, 3])
    settings = {(job.number, index // 4): job.settings for index, job in enumerate(jobs)}
    for generation in (0, 1):
        for number in (0, 1):
            assert settings[number, generation] == settings[number + 2, generation]
    assert len({run.seed for run in settings.values()}) == 4


@pytest.mark.parametrize("search", ["linear", "all"])
def test_the_start_is_the_rule_and_gains_nothing(trainings: Callable[..., ShortTrainings], search: str):
    objective = trainings(lambda jobs: [(job, evolve_module.mean_log_loss(job)) for job in jobs], search=search)
    assert_trees_equal(
        objective.nowcaster(objective.start).params, LearnedDrift.init(jax.random.key(0), num_means=2).params
    )
    assert objective.validate(objective.start) == Gain(0.0, 0.0, 0.0, 2)


def test_a_linear_solution_is_of_the_features_that_it_names(trainings: Callable[..., ShortTrainings]):
    objective = trainings(None)
    nowcaster = objective.nowcaster(jnp.arange(1.0, 1 + objective.start.size).reshape(objective.start.shape))
    kernel = np.asarray(nowcaster.params["linear"]["kernel"])
    changed = {name for name, row in zip(nowcaster.features, kernel, strict=True) if np.any(row)}
    assert changed == set(evolve_module._FEATURES)
    np.testing.assert_array_equal(kernel[nowcaster.features.index("dense")], [4, 5, 6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": 0}, r"--num-pairs 0 must be positive"),
        ({"num_test_runs": 1}, r"--num-test-runs must be at least 2"),
        ({"lengths": ()}, r"--lengths \(\) must be numbers of at least 4 steps"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    tmp_path: Path, tiny_evolve: Callable[..., Evolve], changes: dict[str, Any], message: str
):
    with pytest.raises(UsageError, match=message):
        evolve(tiny_evolve(tmp_path, **changes))
