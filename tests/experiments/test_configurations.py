"""Every experiment is a configuration: here each is checked, and its recorded tables are made again."""

import ast
import csv
import dataclasses
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab.comparing.comparison import run_comparisons
from wnn_jax.lab.comparing.options import Comparison, Execution
from wnn_jax.lab.comparing.plan import make_plan
from wnn_jax.lab.comparing.results import RUNS_FILE, load_results
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import TASKS, load_task
from wnn_jax.lab.tasks.models import ResNet

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
RECORDED = sorted(path.parent.name for path in FOLDER.glob(f"results/*/{RUNS_FILE}"))
BENCHMARKS = {"acceleration": 5, "unseen_tasks": 5}


def experiment(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


def comparisons(name: str) -> dict[str, Comparison]:
    return experiment(name).COMPARISONS


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_a_configuration_with_a_record(name: str) -> None:
    source, record = (FOLDER / f"{name}.py").read_text(), (FOLDER / f"{name}.md").read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert len(docstring.splitlines()) <= 10
    assert f"{name}.md" in docstring
    assert "    python -m experiments" in docstring or "    wnn-jax" in docstring
    assert record.startswith("# ")
    for file in re.findall(r"results/[\w./-]+\.png", record):
        assert (FOLDER / file).is_file(), file
    for plot in FOLDER.glob(f"results/{name}/*.png"):
        assert f"results/{name}/{plot.name}" in record, f"{plot.name} is not shown in its record"
    assert "for step" not in source
    assert "while " not in source


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_tables_are_made_again_from_their_runs(name: str, tmp_path: Path) -> None:
    recorded, module = FOLDER / "results" / name, experiment(name)
    (tmp_path / RUNS_FILE).write_bytes((recorded / RUNS_FILE).read_bytes())
    count = BENCHMARKS.get(name, 0)
    run_comparisons(
        module.COMPARISONS, Execution(output=tmp_path, train=False), benchmark=tuple(module.COMPARISONS)[:count]
    )
    tables = ["summary.csv", *(["benchmark.csv"] if count else [])]
    for table in tables:
        assert read(tmp_path / table) == read(recorded / table)
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {path.name for path in recorded.glob("*.png")}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_belong_to_a_comparison(name: str) -> None:
    known: set[Any] = set()
    for comparison in comparisons(name).values():
        assert comparison.task in TASKS
        assert not set(comparison.search_seeds or ()) & set(comparison.seeds)
        known |= {(comparison.task, method, comparison.num_steps) for method in comparison.methods}
    for result in load_results(FOLDER / "results" / name):
        description = result.description
        # The MLP of the first records trained for longer, and one variant of NiNo is in no table.
        is_extra = (description["task"]["name"], description["num_steps"]) == ("mnist-mlp", 6_000)
        is_extra |= result.method == "nino-published~20"
        assert is_extra or (description["task"]["name"], result.method, description["num_steps"]) in known


@pytest.mark.parametrize(("name", "count"), BENCHMARKS.items())
def test_a_benchmark_has_several_tasks_and_its_rivals(name: str, count: int) -> None:
    chosen = list(comparisons(name).values())[:count]
    assert len({comparison.task for comparison in chosen}) == count
    for comparison in chosen:
        assert {"plain", "wsd", "ademamix-6", "drift"} <= set(comparison.methods)
        assert len(comparison.seeds) >= 3
        # The long language model has only the best two learning rates of the shorter one.
        num_rates = 2 if comparison.num_steps == 10_000 else 4
        assert all(len(comparison.learning_rates_of(method)) >= num_rates for method in comparison.methods)


@pytest.mark.slow
def test_recorded_runs_are_found_by_the_configuration_that_a_user_would_train() -> None:
    """Needs the prepared data sets, which enter the description of a task."""
    data_dir = FOLDER.parents[1] / "shared" / "data" / "tfds"
    if not data_dir.is_dir():
        pytest.skip("no prepared data sets beside the repository")
    for name in ("averaging", "late_phase", "unseen_tasks", "pendulum"):
        for key, comparison in comparisons(name).items():
            plan = make_plan(
                key, comparison, Execution(output=FOLDER / "results" / name, data_dir=data_dir), loads_task=True
            )
            trainable = [method for method in plan.methods if plan.methods[method] is not None]
            results, stale = plan.load(plan.search(trainable))
            assert not stale
            assert len(results) == len(plan.search(trainable))


def test_all_missing_data_of_a_task_with_outliers_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no 'cifar10' and no 'mnist' folder .*'digits-cnn'"):
        experiment("late_phase").make_task(tmp_path)


def test_late_phase_weights_of_the_paper_are_ten_of_norms_and_classifier() -> None:
    (stage,) = experiment("late_phase").METHODS["late-phase-10-both"].stages
    assert stage.num_members == 10
    init = functools.partial(ResNet(features=(8,)).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros([1, 8, 8, 3]))["params"]
    mask = jax.tree_util.tree_leaves_with_path(stage.mask(params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): chosen for path, chosen in mask}
    assert {name for name, chosen in names.items() if chosen} == {
        name for name in names if "BatchNorm" in name or name.startswith("Dense_0")
    }
    assert sum(names.values()) < len(names)


def test_too_few_steps_for_two_checkpoints_are_refused() -> None:
    averaging = experiment("averaging")
    method = averaging.METHODS["twa-tail"]
    with pytest.raises(UsageError, match=r"--num-steps 393: the method 'twa-tail' needs 2 checkpoints, .* least 394"):
        method.optimizer(0.1, 393)
    method.optimizer(0.1, 394)
    (stage,) = method.stages
    assert [stage.first_step(num_steps) // averaging.EPOCH for num_steps in (393, 394)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("averaging", ("annealed", "averages", "twa-v", "drift-twa")),
        ("late_phase", ("annealed", "late-phase", "late-phase-swa")),
    ],
)
def test_methods_of_several_stages_learn_and_are_scored(
    name: str, methods: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_synthetic_data(monkeypatch)
    load_task.cache_clear()
    comparison = next(iter(comparisons(name).values()))
    monkeypatch.setattr("experiments.averaging.NUM_HELD_OUT", 200)
    monkeypatch.setattr("experiments.averaging.EPOCH", 4)
    monkeypatch.setattr("wnn_jax.lab.training.evaluation_weights.NUM_STATISTICS_BATCHES", 2)

    def make_task(data_dir: Path) -> Any:
        # A network of one stage, because compiling takes most of the time.
        task: Any = load_task(comparison.task, data_dir)
        return dataclasses.replace(task, model=ResNet(features=(8,)), batch_size=16)

    small = dataclasses.replace(
        comparison,
        make_task=make_task,
        methods=methods,
        learning_rates=(0.1,),
        own_rates={},
        search_seeds=None,
        seeds=(0,),
        num_steps=64,
        evaluate_every=32,
    )
    rows = run_comparisons({"small": small}, Execution(output=tmp_path, data_dir=tmp_path, num_processes=1))["small"]
    load_task.cache_clear()
    assert [row["method"] for row in rows] == list(methods)
    for row in rows:
        assert row[f"{row['weights']}: accuracy"] > 0.15, f"{row['method']} is no better than chance"
        assert row[f"{row['weights']}: loss"] < 2.3
    expected = {"averaging": {"SWA", "LAWA", "TWA"}, "late_phase": {"SWA"}}[name]
    assert expected <= {column.partition(":")[0] for row in rows for column in row}
