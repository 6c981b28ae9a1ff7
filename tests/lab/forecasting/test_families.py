import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.families import FAMILIES, SPLITS, TEST_SPLITS, VALIDATION_SPLITS, RunSettings
from wnn_jax.lab.tasks import TASKS, load_task
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.language_model import LanguageModel
from wnn_jax.lab.tasks.models import describe_model

NUM = 600
_SETTINGS = RunSettings(
    architecture="mlp-64",
    dataset="digits",
    optimizer="adam",
    learning_rate=1e-3,
    final_learning_rate=1.0,
    batch_size=16,
    num_steps=100,
    snapshot_every=10,
    seed=0,
)
settings = functools.partial(dataclasses.replace, _SETTINGS)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_run_of_an_index_is_fixed(name: str):
    family = FAMILIES[name]
    runs = [family.settings(index) for index in range(NUM)]
    assert runs == [family.settings(index) for index in range(NUM)]
    assert len({run.learning_rate for run in runs}) == NUM
    assert {run.seed for run in runs} == set(range(NUM))
    assert {run.final_learning_rate for run in runs} == {1.0, 0.1, 0.0}
    for run in runs:
        low, high = family.learning_rates[run.optimizer]
        assert low <= run.learning_rate <= high
        assert run.architecture in family.datasets[run.dataset]
    assert family.settings(0) != dataclasses.replace(family, seed=1).settings(0)
    # A group shares a program and a split.
    for first in range(0, NUM, family.group_size):
        group = range(first, first + family.group_size)
        assert len({family.settings(index).program for index in group}) == 1
        assert len({family.split(index) for index in group}) == 1


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_architectures_are_held_out(name: str):
    family = FAMILIES[name]
    architectures: dict[str, set[str]] = {split: set() for split in SPLITS}
    for index in range(NUM):
        architectures[family.split(index)].add(family.settings(index).architecture)
    assert all(architectures.values()), "a split has no runs"
    assert len(architectures["train"]) >= 2
    assert architectures["validation architecture"] == set(family.validation_architectures)
    assert architectures["test architecture"] == set(family.test_architectures)
    seen = architectures["train"] | architectures["validation"] | architectures["test"]
    assert not seen & {*family.validation_architectures, *family.test_architectures}
    assert not set(family.validation_architectures) & set(family.test_architectures)
    # The other groups are held out in the stated shares.
    splits = [family.split(index) for index in range(0, 2_000 * family.group_size, family.group_size)]
    own = [split for split in splits if not split.endswith("architecture")]
    assert own.count("validation") / len(own) == pytest.approx(family.validation_share, abs=0.03)
    assert own.count("test") / len(own) == pytest.approx(family.test_share, abs=0.03)


def test_selection_never_sees_what_is_reported():
    assert not set(VALIDATION_SPLITS) & set(TEST_SPLITS)
    assert {FAMILIES["digits"].split(index) for index in range(12)} == set(SPLITS)
    assert {"train", *VALIDATION_SPLITS, *TEST_SPLITS} == set(SPLITS)


@pytest.mark.slow
def test_no_registered_task_is_in_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)

    def key(task: Any) -> str:
        return f"{task.dataset.name} {describe_model(task.model)}"

    drawn = {
        key(settings(architecture=architecture, dataset=dataset).task(tmp_path))
        for family in FAMILIES.values()
        for dataset, architectures in family.datasets.items()
        for architecture in architectures
    }
    tasks = [load_task(name, tmp_path) for name in TASKS]
    assert not drawn & {key(task) for task in tasks if hasattr(task, "dataset")}


def test_settings_make_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)
    task = settings().task(tmp_path)
    assert isinstance(task, ImageClassification)
    assert (task.dataset.name, task.batch_size, task.augment) == ("digits", 16, None)
    text = settings(architecture="transformer-1x32", dataset="tiny_shakespeare").task(tmp_path)
    assert isinstance(text, LanguageModel)
    assert text.context_length == 32
    longer = settings(architecture="transformer-1x32", dataset="tiny_shakespeare", context_length=64).task(tmp_path)
    assert longer.batch(0, 0)["tokens"].shape == (16, 65)


def test_unknown_names_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="the architecture 'alexnet' is not known; choose from mlp-64, "):
        settings(architecture="alexnet").task(tmp_path)
    with pytest.raises(UsageError, match="the data set 'imagenet' is not known"):
        settings(dataset="imagenet").task(tmp_path)
