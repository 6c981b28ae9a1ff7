import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.lab.toys import Exploding, LinearRegression
from wnn_jax.lab.comparing.comparison import Compare, compare, main, run_comparisons
from wnn_jax.lab.comparing.options import Execution
from wnn_jax.lab.comparing.results import RUNS_FILE, Result, add_result, load_results
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainMembers


def fail_to_load(data_dir: Path) -> Any:
    pytest.fail("It loads data.")


def options(output: Path, toy: Any = None, **changes: Any) -> Compare:
    values: dict[str, Any] = {
        "task": "toy",
        "make_task": lambda data_dir: toy or LinearRegression(),
        "methods": ("plain", "linear"),
        "learning_rates": (0.1,),
        "seeds": (0, 1),
        "num_steps": 20,
        "evaluate_every": 10,
        "snapshot_every": 2,
        "num_processes": 1,
        "output": output,
    }
    return Compare(**(values | changes))


def run(output: Path, toy: Any = None, **changes: Any) -> dict[str, Any]:
    return {row["method"]: row for row in compare(options(output, toy, **changes))}


def names(results: list[Result]) -> list[str]:
    return [f"{run.method} {run.learning_rate:g} {run.seed}" for run in results]


def test_a_comparison_leaves_results_table_and_plot(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.01), checkpoint_seconds=0.0)
    assert list(rows) == ["plain", "linear"]
    assert rows["plain"]["is_reference"]
    assert {row["learning_rate"] for row in rows.values()} == {0.1}
    files = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert files == ["comparison.png", "runs.jsonl.gz", "summary.csv"]
    results = load_results(tmp_path)
    assert len(results) == 8
    linear = next(result for result in results if result.method == "linear")
    assert linear.evaluations[-1].num_nowcasts == 1
    assert linear.made_by["jax"] == jax.__version__
    with (tmp_path / "summary.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["plain", "linear"]


def test_tables_and_plots_are_made_without_task_and_training(tmp_path: Path) -> None:
    trained = run(tmp_path, learning_rates=(0.1, 0.01))
    summary = (tmp_path / "summary.csv").read_bytes()
    for name in ("summary.csv", "comparison.png"):
        (tmp_path / name).unlink()
    assert run(tmp_path, learning_rates=(0.1, 0.01), train=False, make_task=fail_to_load) == trained
    assert (tmp_path / "summary.csv").read_bytes() == summary
    assert (tmp_path / "comparison.png").exists()


def test_methods_that_are_gone_are_shown_from_their_recorded_runs(tmp_path: Path) -> None:
    run(tmp_path)
    results = load_results(tmp_path)
    description = {**results[0].description, "method": {"name": "introspection"}}
    add_result(tmp_path, dataclasses.replace(results[0], description=description))
    changes: dict[str, Any] = {"methods": ("plain", "introspection"), "recorded": ("introspection",)}
    for train in (False, True):
        rows = run(tmp_path, **changes, train=train)
        assert rows["introspection"]["runs"] == 1
    with pytest.raises(UsageError, match="--methods 'introspection' is not known"):
        run(tmp_path, methods=("plain", "introspection"))


def test_rates_can_be_chosen_by_seeds_of_their_own(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.001), search_seeds=(7,))
    runs = ("0.1 7", "0.001 7", "0.1 0", "0.1 1")
    assert sorted(names(load_results(tmp_path))) == sorted(f"{m} {run}" for m in ("plain", "linear") for run in runs)
    assert {row["runs"] for row in rows.values()} == {2}


def test_a_method_can_have_learning_rates_of_its_own(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.01), own_rates={"linear": (0.03,)}, seeds=(0,))
    assert sorted(names(load_results(tmp_path))) == ["linear 0.03 0", "plain 0.01 0", "plain 0.1 0"]
    assert rows["plain"]["is_at_edge"]
    assert not rows["linear"]["is_at_edge"]


def test_several_comparisons_make_one_benchmark(tmp_path: Path) -> None:
    comparisons = {
        "one": options(tmp_path),
        "other": options(tmp_path, LinearRegression(noise=0.5), task="noisy-toy"),
    }
    execution = Execution(output=tmp_path, num_processes=1)
    rows = run_comparisons(comparisons, execution, names=("one",), benchmark=("one", "other"))
    assert (len(rows["one"]), rows["other"]) == (2, [])
    rows = run_comparisons(comparisons, execution, methods=("plain",), benchmark=("one", "other"))
    assert [row["method"] for row in rows["other"]] == ["plain"]
    rows = run_comparisons(comparisons, execution, benchmark=("one", "other"))
    assert len(load_results(tmp_path)) == 8
    with (tmp_path / "benchmark.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["method"], row["tasks"]) for row in table] == [("plain", "2"), ("linear", "2")]
    assert {"one.png", "other.png", "benchmark.png"} <= {path.name for path in tmp_path.iterdir()}
    for change, message in (({"names": ("two",)}, "--comparisons 'two'"), ({"methods": ("best",)}, "--methods 'best'")):
        with pytest.raises(UsageError, match=f"{message} is not known"):
            run_comparisons(comparisons, execution, **change)


def test_stale_results_are_named_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"methods": ("plain",), "seeds": (0,)}
    run(tmp_path, **changes)
    (result,) = load_results(tmp_path)
    (tmp_path / RUNS_FILE).unlink()
    add_result(tmp_path, dataclasses.replace(result, version=0))
    capsys.readouterr()
    assert run(tmp_path, **changes, train=False)["plain"]["runs"] == 1
    assert "1 results are stale, for example: stale: plain, rate 0.1, seed 0: RESULTS_VERSION was 0" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    run(tmp_path, **changes)
    assert "note: stale: plain, rate 0.1, seed 0: RESULTS_VERSION was 0" in capsys.readouterr().out
    assert [result.version for result in load_results(tmp_path)] == [0, 1]
    run(tmp_path, LinearRegression(noise=0.5), **changes)
    assert "task.noise was 0.1 and is 0.5" in capsys.readouterr().out
    assert len(load_results(tmp_path)) == 3


def test_a_run_that_diverges_is_recorded(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, Exploding(), methods=("plain",))["plain"]["diverged"] == 2
    assert [result.diverged for result in load_results(tmp_path)] == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0 must be positive"),
        ({"snapshot_every": -1}, "--snapshot-every -1 must be positive"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds -1.0 must not be negative"),
        ({"learning_rates": ()}, r"--learning-rates \(none\) must be at least one"),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates 0.1 0.1 must be .* distinct"),
        ({"learning_rates": (0.1, -0.1)}, "--learning-rates 0.1 -0.1 must be .* positive"),
        ({"learning_rates": (float("nan"),)}, "--learning-rates nan must be .* finite"),
        ({"own_rates": {"linear": ()}}, r"--learning-rates \(none\) must be at least one"),
        ({"seeds": (1, 1)}, "--seeds 1 1 must be at least one, distinct"),
        ({"search_seeds": (-1,)}, "--search-seeds -1 must be .* not negative"),
        ({"evaluate_every": 21}, "--evaluate-every 21 must not exceed --num-steps 20"),
        (
            {"snapshot_every": 10, "make_task": fail_to_load},
            "--snapshot-every 10: the method 'linear' jumps first after 5 snapshots",
        ),
        ({"evaluation_weights": "SWA"}, r"--evaluation-weights 'SWA': the method 'plain' has only weights, EMA \.99"),
        ({"target": float("inf")}, "--target inf must be a finite value"),
        ({"metric": "bleu"}, "--metric 'bleu' is not known; choose from mse, close"),
        ({"optimizer": "lion"}, "--optimizer 'lion' is not known; choose from adam"),
        ({"methods": ("linear@none",)}, "'linear@none' cannot be used"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match=r"--output .* is a file; name a folder"):
        run(tmp_path / "out")


ONE, TWO = np.float32(1), np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("name", "returned", "message"),
    [
        ("describe", {"data": object()}, r"Broken\.describe\(\) cannot be written as JSON"),
        ("loss", (TWO, {}), r"Broken\.loss\(\) has the shape \(2,\); return a scalar"),
        ("measure", {"mse": (ONE, ONE)}, r"Broken\.measure\(\) returns no close, but Broken\.metrics has it"),
        (
            "measure",
            {"mse": (ONE, ONE), "close": (TWO, TWO)},
            r"sum of the shape \(2,\) and a weight of \(2,\) for 'close'; .* give the Metric a from_mean",
        ),
    ],
)
def test_a_task_that_breaks_the_protocol_is_refused(name: str, returned: Any, message: str, tmp_path: Path) -> None:
    broken = type("Broken", (LinearRegression,), {name: lambda *_: returned})
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", broken())
    assert not (tmp_path / "out").exists()


def train_members(learning_rate: float, num_steps: int, first_cycle: int, cycle: int) -> optax.GradientTransformation:
    return optax.sgd(learning_rate)


METHODS = {
    "of-an-actor": Method("of-an-actor", lambda rate, num_steps: optax.masked(optax.sgd(rate), {"actor": True})),
    "of-norms": Method("of-norms", lambda rate, num_steps: optax.sgd(rate), stages=(TrainMembers(train_members),)),
}


@pytest.mark.parametrize(
    ("method", "message"), [("of-an-actor", "pytree structure error"), ("of-norms", "mask selects nothing")]
)
def test_a_method_that_cannot_train_the_task_is_refused_before_any_is_trained(
    method: str, message: str, tmp_path: Path
) -> None:
    prefix = f"--methods '{method}' does not fit --task 'toy' or --num-steps 20, change one of them: "
    with pytest.raises(UsageError, match=f"^{prefix}.*{message}[^\n]*$"):
        run(tmp_path / "out", methods=("plain", method), own_methods=METHODS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("imagenet", r"the task 'imagenet' is not known; choose from .*digits-cnn"),
        ("cifar10-three-conv", r"(?s)download_and_prepare.*digits"),
    ],
)
def test_a_task_without_code_or_data_is_refused(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", task=task, make_task=None, data_dir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_line_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = {"one": options(tmp_path)}

    def run_main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["experiment.py", "--output", str(tmp_path), *arguments])
        main(comparisons, "An experiment.")

    run_main("--methods", "plain", "--num-processes", "1")
    assert names(load_results(tmp_path)) == ["plain 0.1 0", "plain 0.1 1"]
    with pytest.raises(SystemExit, match="error: --comparisons 'two' is not known; choose from one"):
        run_main("--comparisons", "two")
