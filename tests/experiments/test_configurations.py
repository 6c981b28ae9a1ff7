"""Every experiment is a configuration: here each is run, in a few steps, on small data of the same shapes."""

import csv
import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab.comparing.comparison import Compare, check, compare
from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import TASKS, load_task
from wnn_jax.lab.tasks.models import ResNet
from wnn_jax.lab.training.optimizers import base_optimizer

FOLDER = Path(__file__).parents[2] / "experiments"
DOCS = FOLDER.parent / "docs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
SURVEYS = ("acceleration", "unseen_tasks")
COMPARISONS = [name for name in NAMES if name not in ("diffusion", "forecasts", "nino_grid", "pretraining", *SURVEYS)]


def experiment(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture(autouse=True)
def _synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_synthetic_data(monkeypatch)
    load_task.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_a_configuration_with_a_record(name: str) -> None:
    module = experiment(name)
    assert dataclasses.is_dataclass(module.CONFIG)
    assert "|---|" in module.__doc__, "the docstring is the record"
    for folder in re.findall(r"results/[\w/-]+", module.__doc__):
        assert (FOLDER / folder).is_dir()
    assert f"experiments/{name}.py" in (DOCS / "records" / f"{name}.md").read_text()
    assert f"records/{name}\n" in (DOCS / "records.md").read_text()
    source = (FOLDER / f"{name}.py").read_text().replace(module.__doc__, "")
    assert "while " not in source
    assert "for step" not in source


@pytest.mark.parametrize("name", COMPARISONS)
def test_what_a_comparison_names_exists(name: str) -> None:
    module = experiment(name)
    assert isinstance(module.CONFIG, Compare)
    check(module.CONFIG)
    assert module.CONFIG.task in TASKS
    base = getattr(module, "sgd", base_optimizer(module.CONFIG.optimizer))
    methods = find_methods(module.CONFIG.methods, base, further=getattr(module, "METHODS", None))
    assert any(method.is_plain for method in methods)
    assert len(module.CONFIG.seeds) >= 3


@pytest.mark.slow_but(1)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("averaging", "--task digits-cnn"),
        ("averaging", "--optimizer adam"),
        ("late_phase", "--task digits-cnn"),
        ("late_phase_rank_one", "--task cifar10-16-resnet"),
        ("late_phase_rank_one", "--optimizer adam"),
        ("pendulum", "--optimizer sgd"),
    ],
)
def test_options_that_an_experiment_fixes_are_refused(name: str, option: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", f"experiments.{name}", *option.split(), "--output", str(tmp_path / "out")]
    failed = subprocess.run(program, check=False, capture_output=True, text=True, cwd=FOLDER.parent)
    flag, value = option.split()
    assert failed.stderr.startswith(f"error: {flag} {value!r} has no effect")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SURVEYS)
def test_what_a_survey_compares_exists(name: str) -> None:
    comparisons = experiment(name).COMPARISONS
    assert len(comparisons) >= 5
    assert len({config.task for config in comparisons}) == len(comparisons)
    for config in comparisons:
        check(config)
        assert config.task in TASKS
        methods = {method.name: method for method in find_methods(config.methods, base_optimizer(config.optimizer))}
        assert {"plain", "ademamix-6", "drift"} <= set(methods)
        assert len(config.seeds) >= 3
        assert not set(config.search_seeds) & set(config.seeds)
        # Of the language model, the best two of those that the other survey tried.
        num_rates = 2 if config.task == "shakespeare-transformer" and name == "unseen_tasks" else 4
        assert all(len(config.rates_of(method)) >= num_rates for method in methods)


def test_the_grid_is_of_the_networks_and_the_data_of_its_paper(tmp_path: Path) -> None:
    comparisons = experiment("nino_grid").COMPARISONS
    tasks: list[Any] = [load_task(config.task, tmp_path) for config in comparisons]
    assert [(task.dataset.name, *task.model.features, task.model.num_classes) for task in tasks] == [
        ("fashion-mnist", 16, 32, 32, 10),
        ("fashion-mnist", 32, 64, 64, 10),
        ("cifar10", 16, 32, 32, 10),
        ("cifar10", 32, 64, 64, 10),
        ("cifar100", 32, 64, 64, 100),
    ]
    for config, task in zip(comparisons, tasks, strict=True):
        check(config)
        assert task.batch_size == 128
        # As in the paper: 50 snapshots, and ten jumps.
        assert (config.num_steps, config.snapshot_every) == (10_000, 200)
        methods = find_methods(config.methods, base_optimizer(config.optimizer), snapshot_every=config.snapshot_every)
        assert [method.is_plain for method in methods] == [True, False, False]


def test_all_data_that_is_missing_of_a_task_with_outliers_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with pytest.raises(
        UsageError, match=r"no 'cifar10' and no 'mnist' folder .* trained now: pendulum-ddpg, digits-cnn\.$"
    ):
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
    with pytest.raises(
        UsageError, match=r"--num-steps 393: the method 'twa-tail' needs 2 checkpoints, .* at least 394"
    ):
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
    module = experiment(name)
    monkeypatch.setattr("experiments.averaging.NUM_HELD_OUT", 200)
    monkeypatch.setattr("experiments.averaging.EPOCH", 4)
    monkeypatch.setattr("wnn_jax.lab.training.evaluation_weights.NUM_STATISTICS_BATCHES", 2)

    def make_task(data_dir: Path) -> Any:
        # A network of one stage, because what takes the time is to compile it for every method and stage.
        task: Any = load_task(module.CONFIG.task, data_dir)
        return dataclasses.replace(task, model=ResNet(features=(8,)), batch_size=16)

    config = dataclasses.replace(
        module.CONFIG,
        methods=methods,
        learning_rates=(0.1,),
        own_rates={},
        search_seeds=None,
        seeds=(0,),
        num_steps=64,
        evaluate_every=32,
        num_processes=1,
        output=tmp_path,
        data_dir=tmp_path,
    )
    rows = compare(config, make_task=make_task, base=module.sgd, methods=module.METHODS)
    assert [row["method"] for row in rows] == list(methods)
    with (tmp_path / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            best = float(row[f"{row['reading']}: accuracy"])
            assert best > 0.15, f"{row['method']} is no better than chance"
            assert float(row[f"{row['reading']}: loss"]) < 2.3
    readings = {"averaging": {"SWA", "LAWA", "TWA"}, "late_phase": {"SWA"}}[name]
    assert readings <= {column.partition(":")[0] for row in rows for column in row}
