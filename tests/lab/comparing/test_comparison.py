import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import wnn_jax
from tests.lab.toys import Exploding, LinearRegression, NormalizedRegression
from wnn_jax.lab.comparing import comparison
from wnn_jax.lab.comparing.comparison import Compare, compare, main
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainMembers

REPOSITORY = Path(__file__).parents[3]


def options(output: Path, **changes: Any) -> Compare:
    values: dict[str, Any] = {
        "task": "toy",
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


def run(output: Path, task: Any = None, **changes: Any) -> dict[str, Any]:
    rows = compare(options(output, **changes), make_task=lambda data_dir: task or LinearRegression())
    return {row["method"]: row for row in rows}


def results(output: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((output / "runs").glob("*.json"))}


def test_a_comparison_leaves_results_table_and_plots(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.01))
    assert list(rows) == ["plain", "linear"]
    assert rows["plain"]["is_reference"]
    assert {row["learning_rate"] for row in rows.values()} == {0.1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "learning-rates.png",
        "runs",
        "summary.csv",
    ]
    run(tmp_path)
    assert not (tmp_path / "learning-rates.png").exists(), "it was of another call"
    run(tmp_path, learning_rates=(0.1, 0.01))
    contents = results(tmp_path)
    assert len(contents) == 8
    assert len({content["key"] for content in contents.values()}) == 8
    content = contents[next(name for name in contents if name.startswith("linear-rate0.1-seed1"))]
    assert content["evaluations"][-1]["num_nowcasts"] == 1
    assert content["environment"]["jax"] == content["description"]["versions"]["jax"] == jax.__version__
    with (tmp_path / "summary.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["plain", "linear"]


def test_finished_runs_are_kept_and_further_ones_added(tmp_path: Path) -> None:
    before = run(tmp_path, methods=("plain",))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    after = run(tmp_path, methods=("plain", "cosine"))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(results(tmp_path)) == 4
    assert after["plain"]["weights: mse"] == before["plain"]["weights: mse"]
    run(tmp_path, methods=("plain",), resume=False)
    assert all(path.stat().st_mtime_ns > times[path] for path in times)


def test_rates_can_be_chosen_by_seeds_of_their_own(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.001), search_seeds=(7,))
    names = [name.rsplit("-", 1)[0] for name in results(tmp_path)]
    assert sorted(names) == sorted(
        f"{method}-{run}"
        for method in ("plain", "linear")
        for run in ("rate0.1-seed7", "rate0.001-seed7", "rate0.1-seed0", "rate0.1-seed1")
    )
    assert {row["runs"] for row in rows.values()} == {2}


def test_an_method_can_have_rates_of_its_own(tmp_path: Path) -> None:
    rows = run(tmp_path, learning_rates=(0.1, 0.01), own_rates={"linear": (0.03,)}, seeds=(0,))
    names = sorted(name.rsplit("-", 2)[0] for name in results(tmp_path))
    assert names == ["linear-rate0.03", "plain-rate0.01", "plain-rate0.1"]
    assert rows["plain"]["is_at_edge"]
    assert not rows["linear"]["is_at_edge"]


@pytest.mark.slow
def test_a_retrained_nowcaster_does_not_get_the_old_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowcaster: Any = wnn_jax.load("adaptive-linear")
    path = tmp_path / "nowcaster.npz"
    wnn_jax.save(nowcaster, path)
    methods = ("plain", str(path))
    output = tmp_path / "out"
    before = run(output, methods=methods, seeds=(0,))
    wnn_jax.save(dataclasses.replace(nowcaster, params=jax.tree.map(lambda leaf: 1.5 * leaf, nowcaster.params)), path)
    capsys.readouterr()
    after = run(output, methods=methods, seeds=(0,))
    assert after["plain"] == before["plain"]
    assert after["nowcaster"]["weights: mse"] != before["nowcaster"]["weights: mse"]
    assert len(results(output)) == 3, "the old one is kept"
    printed = capsys.readouterr().out
    assert "nowcaster-rate0.1-seed0" in printed
    assert "was made by something else and is not shown: method.fingerprint was" in printed


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("change", "task", "difference"),
    [
        ({"num_steps": 30}, None, "num_steps was 20 and is 30"),
        ({}, LinearRegression(noise=0.5), "task.noise was 0.1 and is 0.5"),
        ({}, NormalizedRegression(), "task.fingerprint was"),
    ],
)
def test_results_of_something_else_are_named_and_not_shown(
    change: dict[str, Any], task: Any, difference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, methods=("plain",), seeds=(0,))
    capsys.readouterr()
    run(tmp_path, task, methods=("plain",), seeds=(0,), **change)
    assert difference in capsys.readouterr().out
    assert len(results(tmp_path)) == 2


def test_results_of_other_versions_are_named_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, methods=("plain",), seeds=(0,))
    (path,) = (tmp_path / "runs").iterdir()
    content = json.loads(path.read_text())
    content["description"]["versions"]["jax"] = "0.1.0"
    content["key"] = comparison.run_key(content["description"])
    path.with_name("old.json").write_text(json.dumps(content))
    path.unlink()
    capsys.readouterr()
    run(tmp_path, methods=("plain",), seeds=(0,))
    assert f"old.json was made by something else and is not shown: versions.jax was 0.1.0 and is {jax.__version__}" in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_a_run_that_diverges_is_recorded(tmp_path: Path) -> None:
    rows = run(tmp_path, Exploding(), methods=("plain",))
    assert rows["plain"]["diverged"] == 2
    assert all(content["diverged"] for content in results(tmp_path).values())
    again = run(tmp_path, Exploding(), methods=("plain",))
    assert again["plain"]["diverged"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0 must be positive"),
        ({"evaluate_every": 0}, "--evaluate-every 0 must be positive"),
        ({"snapshot_every": -1}, "--snapshot-every -1 must be positive"),
        ({"num_processes": 0}, "--num-processes 0 must be positive"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds -1.0 must not be negative"),
        ({"learning_rates": ()}, r"--learning-rates \(none\) must be at least one"),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates 0.1 0.1 must be .* distinct"),
        ({"learning_rates": (0.1, -0.1)}, "--learning-rates 0.1 -0.1 must be .* positive"),
        ({"learning_rates": (float("nan"),)}, "--learning-rates nan must be .* finite"),
        ({"own_rates": {"linear": ()}}, r"--learning-rates \(none\) must be at least one"),
        ({"seeds": ()}, r"--seeds \(none\) must be at least one"),
        ({"seeds": (1, 1)}, "--seeds 1 1 must be at least one, distinct"),
        ({"search_seeds": (-1,)}, "--search-seeds -1 must be .* not negative"),
        ({"evaluate_every": 21}, "--evaluate-every 21 must not exceed --num-steps 20"),
        ({"snapshot_every": 21}, "--snapshot-every 21 must not exceed --num-steps 20"),
        ({"snapshot_every": 10}, "--snapshot-every 10: the method 'linear' jumps first after 5 snapshots"),
        ({"reading": "SWA"}, r"--reading 'SWA' is not one of the method 'plain': weights, EMA \.99, EMA \.998"),
        ({"target": float("inf")}, "--target inf must be a value"),
        ({"metric": "bleu"}, "--metric 'bleu' is not one of the task's: mse, close"),
        ({"optimizer": "lion"}, "--optimizer 'lion' is not known; choose from adam"),
        ({"methods": ("best",)}, "--methods 'best' is not known. Methods: plain"),
        ({"methods": ("linear@none",)}, "@none is no number"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"--output .* is a file; name a folder"):
        run(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@dataclasses.dataclass(frozen=True)
class Broken(LinearRegression):
    """A task with one fault."""

    fault: str = ""

    def describe(self) -> Any:
        return {"data": object()} if self.fault == "describe" else super().describe()

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        loss, rest = super().loss(params, model_state, batch, key)
        return loss[None] if self.fault == "loss" else loss, rest

    def measure(self, params: Any, model_state: Any, batch: Any) -> Any:
        measured = dict(super().measure(params, model_state, batch))
        if self.fault == "measure":
            del measured["close"]
        if self.fault == "vector":
            measured["close"] = tuple(jnp.stack([value, value]) for value in measured["close"])
        return measured


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("describe", r"Broken\.describe\(\) cannot be written as JSON"),
        ("loss", r"Broken\.loss\(\) has the shape \(1,\); return a scalar"),
        ("measure", r"Broken\.measure\(\) returns no close, but Broken\.metrics has it"),
        ("vector", r"sum of the shape \(2,\) and a weight of \(2,\) for 'close'; .* give the Metric a from_mean"),
    ],
)
def test_a_task_that_breaks_the_protocol_is_refused(fault: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "out", Broken(fault=fault))
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
def test_an_method_that_cannot_train_the_task_is_refused_before_any_is_trained(
    method: str, message: str, tmp_path: Path
) -> None:
    prefix = f"--methods '{method}' does not fit --task 'toy' or --num-steps 20, change one of them: "
    with pytest.raises(UsageError, match=f"^{prefix}.*{message}[^\n]*$"):
        compare(
            options(tmp_path / "out", methods=("plain", method)),
            make_task=lambda _: LinearRegression(),
            methods=METHODS,
        )
    assert not (tmp_path / "out").exists()


def test_too_short_a_training_is_refused_before_data_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--snapshot-every 10: the method 'linear' jumps first after 5 snapshots"):
        compare(options(tmp_path, snapshot_every=10), make_task=lambda data_dir: pytest.fail("loads data"))


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the task 'imagenet' is not known; choose from .*digits-cnn"):
        compare(options(tmp_path / "out", task="imagenet"))
    assert not (tmp_path / "out").exists()


def test_missing_data_names_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)download_and_prepare.*digits"):
        compare(options(tmp_path / "out", task="cifar10-three-conv", data_dir=tmp_path))
    assert not (tmp_path / "out").exists()


def test_results_of_the_first_version_are_kept_and_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds results of version 1, but this wnn_jax reads version 2.*kept"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is damaged .*remove it"),
        ('{"a": 1}', "is no result of a comparison; move it elsewhere"),
        ('{"method": "none"}', "is a result of version 1, but this wnn_jax reads version 2"),
        ('{"format": "wnn_jax.result", "version": 3}', "is a result of version 3, but this wnn_jax reads version 2"),
        ('{"format": "wnn_jax.result", "version": 2}', "is damaged .*remove it"),
    ],
)
def test_files_that_are_no_results_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        run(tmp_path)
    assert (tmp_path / "runs" / "one.json").read_text() == content


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_identical_weights(tmp_path: Path) -> None:
    # One device and the default threads, as a user's run has them.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process_options: dict[str, Any] = {"cwd": REPOSITORY, "env": environment, "text": True}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    program = [sys.executable, "-m", "tests.lab.comparing.staged_comparison", "--output"]
    subprocess.run([*program, str(undisturbed)], check=True, capture_output=True, **process_options)

    with subprocess.Popen([*program, str(killed)], stdout=subprocess.DEVNULL, **process_options) as process:
        # In the second stage, which begins at step 60.
        pattern = "runs/checkpoints/*/stage-1/*"
        while process.poll() is None and not any(
            int(path.name) >= 80 for path in killed.glob(pattern) if path.name.isdigit()
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not results(killed)

    subprocess.run([*program, str(killed), "--resume"], check=True, capture_output=True, **process_options)
    (one,), (other,) = (list(results(folder).values()) for folder in (undisturbed, killed))
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["test"] == other["test"]
    for before, after in zip(one["evaluations"], other["evaluations"], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert not (killed / "runs" / "checkpoints").exists(), "nothing is left behind"


@pytest.mark.parametrize("name", ["task", "optimizer"])
def test_what_an_experiment_fixes_is_not_ignored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(tmp_path / "out", optimizer="sgd")

    def run_main(value: str) -> None:
        monkeypatch.setattr(sys, "argv", ["experiment.py", f"--{name}", value])
        main(config, None, make_task=lambda data_dir: pytest.fail("loads data"), base=optax.sgd)

    with pytest.raises(
        SystemExit, match=rf"error: --{name} 'other' has no effect, because the {name} is .*leave it out"
    ):
        run_main("other")
    with pytest.raises(pytest.fail.Exception, match="loads data"):
        run_main(getattr(config, name))


def test_help_and_errors_on_the_command_line() -> None:
    program = [sys.executable, "-m", "experiments.digits"]
    shown = subprocess.run([*program, "--help"], check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    for option in (
        "--methods",
        "--learning-rates",
        "--seeds",
        "--snapshot-every",
        "--resume",
        "--target",
        "--executor",
    ):
        assert option in shown
    failed = subprocess.run([*program, "--num-steps", "0"], check=False, capture_output=True, text=True, cwd=REPOSITORY)
    assert failed.returncode == 1
    assert failed.stderr == "error: --num-steps 0 must be positive.\n"
