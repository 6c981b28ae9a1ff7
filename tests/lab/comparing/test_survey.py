import csv
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.toys import LinearRegression, NormalizedRegression
from wnn_jax.lab import tasks
from wnn_jax.lab.comparing.comparison import Compare
from wnn_jax.lab.comparing.summary import Row
from wnn_jax.lab.comparing.survey import Survey, survey
from wnn_jax.lab.errors import UsageError

REPOSITORY = Path(__file__).parents[3]


def comparison(task: str, *methods: str) -> Compare:
    return Compare(
        task=task,
        methods=("plain", *methods),
        learning_rates=(0.1,),
        search_seeds=(7,),
        seeds=(0, 1),
        num_steps=40,
        evaluate_every=10,
        snapshot_every=4,
    )


COMPARISONS = (comparison("linear", "drift", "snoo"), comparison("normalized", "drift"))


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "linear": tasks.Entry(None, lambda _: LinearRegression()),
        "normalized": tasks.Entry(None, lambda _: NormalizedRegression()),
    }
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, **table})


def run(output: Path, comparisons: tuple[Compare, ...] = COMPARISONS, **options: Any) -> dict[str, Row]:
    rows = survey(Survey(output=output, data_dir=output / "data", num_processes=1, **options), comparisons)
    return {row["method"]: row for row in rows}


def times(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("*/runs/*.json")}


@pytest.mark.slow
def test_the_tasks_are_trained_one_after_another_and_shown_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path, tasks=("linear",))
    assert {method: row["tasks"] for method, row in first.items()} == {"plain": 1, "drift": 1, "snoo": 1}
    assert "missing: normalized: plain, drift\n" in capsys.readouterr().out
    assert "- missing: normalized: plain, drift\n" in (tmp_path / "table.md").read_text()
    before = times(tmp_path)

    table = run(tmp_path)
    assert {method: row["tasks"] for method, row in table.items()} == {"plain": 2, "drift": 2, "snoo": 1}
    assert before.items() <= times(tmp_path).items(), "finished runs are kept"
    assert len(times(tmp_path)) == len(before) + 2 * (1 + 2)
    assert "missing" not in capsys.readouterr().out + (tmp_path / "table.md").read_text()
    with (tmp_path / "tasks.csv").open() as file:
        saved = {(row["task"], row["method"]): float(row["steps_saved"]) for row in csv.DictReader(file)}
    assert len(saved) == 5
    drift = table["drift"]
    assert drift["steps_saved"] == pytest.approx(
        (saved["linear", "drift"] + saved["normalized", "drift"]) / 2, abs=1e-6
    )
    assert drift["worst"] == pytest.approx(saved[drift["worst_task"], "drift"], abs=1e-6)
    assert (tmp_path / "steps-saved.png").exists()
    assert {path.name for path in (tmp_path / "linear").iterdir()} >= {"summary.csv", "curves.png", "runs"}

    before = times(tmp_path)
    assert run(tmp_path, train=False) == table
    assert times(tmp_path) == before


def test_what_is_not_finished_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, COMPARISONS[:1], methods=("drift",))
    assert rows == {}, "there is no plain method yet to compare with"
    assert "missing: linear: plain, drift, snoo\n" in capsys.readouterr().out
    assert list(run(tmp_path, COMPARISONS[:1], methods=("plain",))) == ["plain", "drift"]
    assert "missing: linear: snoo\n" in capsys.readouterr().out
    # One of the results is lost.
    next(path for path in times(tmp_path) if path.name.startswith("drift-") and "seed1-" in path.name).unlink()
    assert list(run(tmp_path, COMPARISONS[:1], train=False)) == ["plain"]
    assert "missing: linear: drift, snoo\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("imagenet",)}, "--tasks 'imagenet' is not known; choose from linear, normalized"),
        ({"methods": ("best",)}, "--methods 'best' is a method of no task here; choose from plain, drift, snoo"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        survey(dataclasses.replace(Survey(output=tmp_path / "out", data_dir=tmp_path), **options), COMPARISONS)
    assert not (tmp_path / "out").exists()


def test_all_missing_data_is_listed_at_once(tmp_path: Path) -> None:
    comparisons = tuple(comparison(task) for task in ("cifar10-three-conv", "mnist-mlp", "linear"))
    with pytest.raises(UsageError, match="holds no 'cifar10' and no 'mnist' folder"):
        run(tmp_path / "out", comparisons)
    assert list(run(tmp_path / "out", comparisons, tasks=("linear",))) == ["plain"]


def test_help_on_the_command_line() -> None:
    program = [sys.executable, "-m", "experiments.acceleration", "--help"]
    shown = subprocess.run(program, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    for option in ("--tasks", "--methods", "--no-train", "--output", "--data-dir", "--no-resume", "--executor"):
        assert option in shown
    assert "cifar10-16-three-conv" in shown
