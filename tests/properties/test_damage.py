"""Files that are damaged or missing: one line names the file, or nothing changes."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import wnn_jax
from tests.lab.conftest import tiny_family
from tests.properties.strategies import damaged, num_examples
from wnn_jax.lab.comparing.results import Result, add_result, load_results
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.trajectories import load_trajectories, save_trajectory
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.checkpoints import load_state, save_state
from wnn_jax.lab.training.trainer import Evaluation
from wnn_jax.nowcasters import Drift

_STATE = {"w": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), "count": np.int32(7)}


class Files(NamedTuple):
    """Files that may be damaged: how to write them to a folder, how to read them, and which errors reading raises."""

    write: Callable[[Path], None]
    read: Callable[[Path], Mapping[str, Any]]
    errors: tuple[type[Exception], ...] = (UsageError,)


def _write_collection(folder: Path) -> None:
    rng, family = np.random.default_rng(0), tiny_family()
    for index in range(3):
        snapshots = [{"Dense_0": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}} for _ in range(5)]
        save_trajectory(folder, family, index, snapshots, rng.random(5).tolist(), {"loss": 0.5, "accuracy": 0.75})


def read_collection(folder: Path) -> dict[str, Any]:
    return {
        str(run.index): (run.settings, run.split, run.leaves, run.losses, run.validation, run.snapshots.tobytes())
        for run in load_trajectories([folder])
    }


def _write_result(folder: Path) -> None:
    scores = {"weights": {"loss": 0.25}}
    evaluations = [Evaluation(20, 1.0, 0.5, scores, num_nowcasts=0, num_rejected=0)]
    description = {"method": {"name": "sgd"}, "learning_rate": 0.1, "seed": 0, "num_steps": 20}
    add_result(folder, Result(description, (Metric("loss", higher_is_better=False),), evaluations, scores))


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    state, log = load_state(folder / "20", _STATE)
    return {"state": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], "log": log}


def _nowcaster_file(nowcaster: Any) -> Files:
    def read(folder: Path) -> dict[str, Any]:
        loaded: Any = wnn_jax.load(folder / "nowcaster.npz")
        settings = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
        weights = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(dict(settings.pop("params", {})))]
        return {"class": type(loaded), "settings": settings, "weights": weights}

    return Files(lambda folder: wnn_jax.save(nowcaster(), folder / "nowcaster.npz"), read, (ValueError, OSError))


_FILES = {
    "rule": _nowcaster_file(lambda: Drift(gain=0.04, max_rows=None)),
    "network": _nowcaster_file(lambda: wnn_jax.load("wnn")),
    "collection": Files(_write_collection, read_collection),
    "result": Files(
        _write_result, lambda folder: {str(result.seed): dataclasses.asdict(result) for result in load_results(folder)}
    ),
    "checkpoint": Files(lambda folder: save_state(folder / "20", _STATE, {"losses": [0.5, 0.25]}), _read_checkpoint),
}


@functools.cache
def _written(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files, and their content."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _FILES[name].write(folder)
        # A lock file holds nothing.
        files = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
        return files, dict(_FILES[name].read(folder))


@pytest.mark.parametrize("name", _FILES)
@hypothesis.settings(max_examples=num_examples(5))
@hypothesis.given(data=st.data())
def test_damage_is_noticed_or_harmless(name: str, data: st.DataObject):
    files, expected = _written(name)
    chosen = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(st.one_of(damaged(files[chosen]), st.none()))
    with tempfile.TemporaryDirectory() as folder:
        for file, whole in {**files, chosen: content}.items():
            if whole is not None:  # `None` is a missing file.
                Path(folder, file).write_bytes(whole)
        message = ""
        try:
            content_read = _FILES[name].read(Path(folder))
        except _FILES[name].errors as error:
            content_read, message = expected, str(error)
        assert not message or folder in message
        assert "\n" not in message
        # A run without its record was not finished.
        assert content_read.keys() == expected.keys() or content is None
        assert content_read.items() <= expected.items()
