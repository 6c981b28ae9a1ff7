from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wnn_jax.lab.forecasting import forecasting_task as task_module
from wnn_jax.lab.forecasting.train import Train, train

NUM_EVALUATION_WINDOWS = 4
KIND = "wnn-plus"  # The quickest to train.


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(task_module, "_EVALUATION_WINDOWS_PER_ROLE", NUM_EVALUATION_WINDOWS)


@pytest.fixture(scope="session")
def tiny_train(collection: Path) -> Callable[..., Train]:
    """Options of a training run that takes a second."""

    def options(output: Path, **changes: Any) -> Train:
        settings: dict[str, Any] = {
            "collection": (collection,),
            "kind": KIND,
            "num_steps": 30,
            "windows_per_role": 4,
            "num_weights": 16,
            "validate_every": 10,
        }
        return Train(output=output, **(settings | changes))

    return options


@pytest.fixture(scope="session")
def trained(tiny_train: Callable[..., Train], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run that was not disturbed. Do not change it: copy it first."""
    output = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        train(tiny_train(output))
    return output
