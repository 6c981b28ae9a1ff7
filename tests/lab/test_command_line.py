import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import optax
import pytest

import wnn_jax
from tests.lab.conftest import TINY
from tests.lab.forecasting.conftest import make_quick
from wnn_jax.lab.__main__ import main
from wnn_jax.lab.comparing.methods import standard_methods
from wnn_jax.lab.forecasting.families import FAMILIES
from wnn_jax.lab.forecasting.kinds import KINDS
from wnn_jax.lab.tasks import TASKS
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wnn-jax", *command.split()])
    main()


@pytest.mark.slow
def test_the_stages_in_sequence(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_quick(monkeypatch)
    run(monkeypatch, f"collect --output runs --family {TINY} --num-runs 1 --num-processes 1")
    run(
        monkeypatch,
        f"train --collection {collection} --output trained --num-steps 4 --windows-per-role 2 --num-weights 8",
    )
    nowcasters = "linear trained/nowcaster.npz trained/nowcaster.npz@0.5"
    run(monkeypatch, f"forecast --nowcasters {nowcasters} --collection {collection} --output scores")
    run(monkeypatch, "export --nowcaster trained/nowcaster.npz --name mine --evaluation scores/summary.csv")
    nowcaster: Any = wnn_jax.load("params/mine.npz")
    assert nowcaster.record["kind"] == "pooled-linear"
    assert nowcaster.record["scores"].keys() == {"nowcaster", "nowcaster@0.5"}
    assert nowcaster.record["test"]["forecast error"] > 0


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=r"error: .* holds no finished runs; make some with"):
        run(monkeypatch, f"train --collection {tmp_path} --output {tmp_path / 'trained'}")


def test_what_is_missing_of_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Only this package is installed, and one package of its extra.
    for package in ("wnn-jax", "filelock"):
        (tmp_path / f"{package.replace('-', '_')}-0.dist-info").mkdir()
        text = metadata.distribution(package).read_text("METADATA")
        assert text is not None
        (tmp_path / f"{package.replace('-', '_')}-0.dist-info" / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--help")
    match = re.fullmatch(r"error: not installed: (.*); install with: pip install 'wnn-jax\[lab\]'", str(stopped.value))
    assert match, stopped.value
    named = set(match[1].split(", "))
    assert {"tyro", "matplotlib", "rich", "scikit-learn", "tensorflow-datasets"} < named
    assert not {"filelock", "jax", "pytest", "torch"} & named


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        ("demo", (*standard_methods(optax.sgd), "drift", "digits-cnn", "runs/demo")),
        ("collect", FAMILIES),
        ("train", KINDS),
        ("forecast", ("validation", "test")),
        ("compare", (*standard_methods(optax.sgd), *TASKS, *BASE_OPTIMIZERS)),
        ("export", ("params",)),
    ],
    ids=["demo", "collect", "train", "forecast", "compare", "export"],
)
def test_every_command_explains_itself(
    command: str, choices: Iterable[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, f"{command} --help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--output" in shown
    for choice in choices:
        assert choice in shown
