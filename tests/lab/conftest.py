import dataclasses
from pathlib import Path

import pytest

from wnn_jax.lab.forecasting.collect import Collect, collect
from wnn_jax.lab.forecasting.families import FAMILIES, TaskFamily

TINY = "tiny"
NUM_RUNS = 10


def tiny_family() -> TaskFamily:
    """Ten runs of a second each: two for training, validation, test, a validation and a test architecture, in turn."""
    return dataclasses.replace(
        FAMILIES["digits"],
        name=TINY,
        datasets={"digits": ("mlp-64", "mlp-128-64", "cnn-8-16")},
        validation_architectures=("mlp-128-64",),
        test_architectures=("cnn-8-16",),
        learning_rates={"adam": (1e-3, 1.2e-2)},
        batch_sizes=(32,),
        num_steps=48,
        snapshot_every=2,
        validation_share=0.35,
        test_share=0.35,
        seed=1307,
    )


@pytest.fixture(autouse=True)
def _known_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, TINY, tiny_family())


@pytest.fixture(autouse=True)
def _few_batches_for_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wnn_jax.lab.training.evaluation_weights.NUM_STATISTICS_BATCHES", 2)


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collected folder. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("collection")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, TINY, tiny_family())
        collect(Collect(output=folder, family=TINY, num_runs=NUM_RUNS, num_processes=1))
    return folder
