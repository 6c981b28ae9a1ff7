"""The experiments with averages, on a few images and in a few steps."""

import csv
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from experiments import averaging, late_phase
from experiments.harness import batch_norm
from wnn_jax.meta.datasets import Split, load_digits


@pytest.fixture
def lab(tmp_path: Path) -> batch_norm.Lab:
    digits = load_digits()
    few = {
        name: Split(*(array[:number] for array in getattr(digits, name)))
        for name, number in (("train", 160), ("validation", 40), ("test", 40))
    }
    options = batch_norm.Options(
        data_dir=tmp_path, output=tmp_path / "results", num_epochs=5, batch_size=32, seeds=(0,)
    )
    return batch_norm.Lab(dataclasses.replace(digits, **few), options)


@pytest.mark.parametrize(
    ("arms", "names"),
    [
        (
            averaging.arms,
            "sgd, cosine|sgd, constant|swa|lawa-3|ema|twa-t|twa-t, conference|twa-t, 4 bits|twa-v|nowcast|"
            "nowcast, twa-t",
        ),
        (
            functools.partial(late_phase.arms, num_members=2),
            "sgd, cosine|late-phase, 2 members|late-phase, swa",
        ),
    ],
    ids=["averaging", "late-phase"],
)
def test_every_arm_is_scored(lab: batch_norm.Lab, arms: Any, names: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(averaging, "_NUM_HELD_OUT", 40)
    batch_norm.run(lab.options, lab, arms)
    with (lab.options.output / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == names.split("|")
    assert all(0 <= float(row["test_mean"]) <= 1 for row in rows)
    assert (lab.options.output / "accuracies.png").stat().st_size > 1000

    def never(lab: Any, seed: int) -> Any:
        pytest.fail("a finished run was repeated")

    batch_norm.run(lab.options, lab, never)
