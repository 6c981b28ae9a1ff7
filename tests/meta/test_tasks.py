import dataclasses

import pytest

from wnn_jax.meta.architectures import ARCHITECTURES
from wnn_jax.meta.datasets import DATASETS
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.evaluate import END_TO_END_TASKS
from wnn_jax.meta.tasks import FAMILIES, family_of

NUM = 400


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_task_of_an_index_is_fixed(name: str):
    family = FAMILIES[name]
    tasks = [family.task(index) for index in range(NUM)]
    assert tasks == [family.task(index) for index in range(NUM)]
    assert len({task.learning_rate for task in tasks}) == NUM
    assert {task.seed for task in tasks} == set(range(NUM))
    assert {task.final_learning_rate for task in tasks} == {1.0, 0.1, 0.0}
    for task in tasks:
        low, high = family.learning_rates[task.optimizer]
        assert low <= task.learning_rate <= high
        assert task.architecture in family.datasets[task.dataset]
    assert family.task(0) != dataclasses.replace(family, seed=1).task(0)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_groups_share_a_program_and_a_split(name: str):
    family = FAMILIES[name]
    for first in range(0, NUM, family.group_size):
        group = range(first, first + family.group_size)
        assert len({family.task(index).program for index in group}) == 1
        assert len({family.split(index) for index in group}) == 1


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_held_out_architectures_are_in_no_training_run(name: str):
    family = FAMILIES[name]
    splits: dict[str, set[str]] = {}
    for index in range(NUM):
        splits.setdefault(family.split(index), set()).add(family.task(index).architecture)
    assert splits.keys() == {"train", "validation", "held-out architecture"}
    assert splits["held-out architecture"] <= set(family.held_out_architectures)
    assert not (splits["train"] | splits["validation"]) & set(family.held_out_architectures)


def test_every_name_is_known():
    for family in FAMILIES.values():
        assert family.datasets.keys() <= DATASETS.keys()
        for architectures in family.datasets.values():
            assert set(architectures) <= ARCHITECTURES.keys()
    with pytest.raises(UsageError, match="--family 'large' is not known; choose from digits, pooled, small"):
        family_of("large")


def test_the_nets_whose_training_is_to_be_shortened_are_in_no_family():
    architectures = {task.architecture for task in END_TO_END_TASKS.values()}
    drawn = {name for family in FAMILIES.values() for those in family.datasets.values() for name in those}
    assert architectures <= ARCHITECTURES.keys()
    assert not architectures & drawn
