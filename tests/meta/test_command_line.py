import sys
from pathlib import Path

import pytest

import wnn_jax
from tests.meta.conftest import TINY
from tests.meta.learning.conftest import make_quick
from wnn_jax.meta.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wnn_jax.meta", *command.split()])
    main()


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
    nowcaster = wnn_jax.load("params/mine.npz")
    assert isinstance(nowcaster, wnn_jax.nowcasters.AdaptiveLinear)
    assert nowcaster.record["scores"].keys() == {"nowcaster", "nowcaster@0.5"}
    assert nowcaster.record["test"]["forecast error"] > 0


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=r"error: .*manifest\.json does not exist; make a collection with"):
        run(monkeypatch, f"train --collection {tmp_path} --output {tmp_path / 'trained'}")


@pytest.mark.parametrize("stage", ["collect", "train", "evolve", "forecast", "compare", "export"])
def test_every_stage_explains_itself(stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, f"{stage} --help")
    assert stopped.value.code == 0
    assert "--output" in capsys.readouterr().out
