import dataclasses
from pathlib import Path

import pytest

from wnn_jax.meta.collect import Collect, collect
from wnn_jax.meta.tasks import FAMILIES, TaskFamily

TINY = "tiny"
NUM_RUNS = 6


def tiny_family() -> TaskFamily:
    """Six runs of a second each: two for each split."""
    return dataclasses.replace(
        FAMILIES["digits"],
        name=TINY,
        datasets={"digits": ("mlp-64", "mlp-128-64")},
        batch_sizes=(32,),
        num_steps=48,
        snapshot_every=2,
        validation_share=0.4,
        seed=6,
    )


@pytest.fixture(autouse=True)
def _known_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wnn_jax.meta.tasks.FAMILIES", {**FAMILIES, TINY: tiny_family()})


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collected folder. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("collection")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wnn_jax.meta.tasks.FAMILIES", {**FAMILIES, TINY: tiny_family()})
        collect(Collect(output=folder, family=TINY, num_runs=NUM_RUNS, num_processes=1))
    return folder
