import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import wnn_jax
from experiments import cifar10, digits
from experiments.harness import cli
from tests.helpers import train
from wnn_jax.meta.arms import parse_arms
from wnn_jax.meta.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
CIFAR10 = REPOSITORY.parent / "shared" / "data" / "tfds"


def tiny(output: Path, **changes: Any) -> digits.Options:
    values: dict[str, Any] = {"nowcaster": ("none", "linear"), "seeds": (0, 1), "num_epochs": 1, "snapshot_every": 2}
    return dataclasses.replace(digits.Options(output=output), **(values | changes))


def test_a_comparison_leaves_results_table_and_plot(tmp_path: Path) -> None:
    rows = cli.run(tiny(tmp_path / "out"), digits.make_task)
    assert [row["arm"] for row in rows] == ["none", "none", "linear", "linear"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == [
        "curves.png",
        "linear-seed0.json",
        "linear-seed1.json",
        "none-seed0.json",
        "none-seed1.json",
        "settings.json",
        "summary.csv",
    ]


def test_resuming_keeps_finished_runs_and_refuses_other_settings(tmp_path: Path) -> None:
    options = tiny(tmp_path, nowcaster=("none",), seeds=(0,))
    cli.run(options, digits.make_task)
    finished = tmp_path / "none-seed0.json"
    before = finished.stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"--output .* already has results.*--resume"):
        cli.run(options, digits.make_task)
    cli.run(dataclasses.replace(options, resume=True, nowcaster=("none", "none+cosine")), digits.make_task)
    assert finished.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"learning_rate was 0.001 and is 0.1"):
        cli.run(dataclasses.replace(options, resume=True, learning_rate=0.1), digits.make_task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "--num-epochs 0 must be positive"),
        ({"batch_size": -1}, "--batch-size -1 must be positive"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be positive"),
        ({"snapshot_every": 0}, "--snapshot-every 0 must be positive"),
        ({"evaluate_every": 0}, "--evaluate-every 0 must be positive"),
        ({"checkpoint_seconds": -1.0}, "--checkpoint-seconds -1.0 must not be negative"),
        ({"ema_decay": 1.0}, r"--ema-decay 1.0 must be in \[0, 1\)"),
        ({"target": 65.0}, "--target 65.0 must be an accuracy"),
        ({"seeds": ()}, "--seeds  must be distinct"),
        ({"seeds": (1, 1)}, "--seeds 1 1 must be distinct"),
        ({"batch_size": 10_000}, "--batch-size 10000 exceeds the 897 training images"),
        ({"nowcaster": ("none", "none")}, "none twice"),
        ({"nowcaster": ("best",)}, "'best' cannot be used: .*Known names: adaptive-linear"),
        ({"nowcaster": ("missing.npz",)}, "no nowcaster file at 'missing.npz'"),
        ({"nowcaster": ("linear@half",)}, "could not convert string to float"),
        ({"nowcaster": ("none@0.5",)}, "no jumps to scale"),
        ({"nowcaster": ("none~5",)}, "`none` takes no horizon"),
        ({"nowcaster": ("linear~5-0",)}, "at least 1 snapshot"),
        ({"nowcaster": ("linear~far",)}, "invalid literal for int"),
        ({"nowcaster": ("linear~40-1-1",)}, "invalid literal for int"),
        ({"nowcaster": ("linear~",)}, "not of the form"),
        ({"nowcaster": ("linear~5@0.5",)}, "not of the form"),
        ({"nowcaster": ("",)}, "not of the form"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        cli.run(tiny(tmp_path / "out", **change), digits.make_task)
    assert not (tmp_path / "out").exists()


def test_missing_data_names_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)download_and_prepare.*python -m experiments.digits"):
        cifar10.make_task(cifar10.Options(data_dir=tmp_path))


def test_arms(tmp_path: Path) -> None:
    wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0)), tmp_path / "mine.npz")
    arms = parse_arms(("none", "none+cosine", "linear@0.5", f"{tmp_path / 'mine.npz'}@0.25+cosine"))
    assert [arm.label for arm in arms] == ["none", "none+cosine", "linear@0.5", "mine@0.25+cosine"]
    assert [arm.scale for arm in arms] == [1.0, 1.0, 0.5, 0.25]
    assert [arm.cosine for arm in arms] == [False, True, False, True]
    assert [arm.horizon for arm in arms] == [None] * 4
    assert isinstance(arms[3].nowcaster, wnn_jax.nowcasters.WNN)


def test_horizons_of_arms(tmp_path: Path, wnn_plus: wnn_jax.nowcasters.WNNPlus) -> None:
    wnn_jax.save(wnn_plus, tmp_path / "mine.npz")
    arms = parse_arms(("linear~20", "linear@0.5~1-7+cosine", f"{tmp_path / 'mine.npz'}~40-1"))
    assert [arm.label for arm in arms] == ["linear~20", "linear@0.5~1-7+cosine", "mine~40-1"]
    assert [arm.horizon for arm in arms] == [(20, 20), (1, 7), (40, 1)]
    assert [arm.scale for arm in arms] == [1.0, 0.5, 1.0]
    assert [arm.cosine for arm in arms] == [False, True, False]


def test_the_horizon_of_an_arm_goes_from_its_first_to_its_last() -> None:
    ahead = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + horizon)
    arm = dataclasses.replace(parse_arms(("linear~40-1",))[0], nowcaster=ahead)
    tx = arm.optimizer(learning_rate=0.0, num_steps=34, snapshot_every=2)
    updates = [step.updates["w"].item() for step in train(tx, {"w": jnp.zeros([])}, 34)]
    assert [update for update in updates if update != 0] == [40, 13, 1]


def test_an_arm_whose_nowcaster_takes_no_horizon(tmp_path: Path, wnn: wnn_jax.nowcasters.WNN) -> None:
    wnn_jax.save(wnn, tmp_path / "mine.npz")
    with pytest.raises(UsageError, match=r"'.*mine\.npz~5' cannot be used: `.*` takes no horizon"):
        parse_arms((f"{tmp_path / 'mine.npz'}~5",))


@pytest.mark.parametrize("experiment", ["cifar10", "digits"])
def test_help_and_errors_on_the_command_line(experiment: str) -> None:
    command = [sys.executable, "-m", f"experiments.{experiment}"]
    shown = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    for option in ("--nowcaster", "--seeds", "--snapshot-every", "--resume", "--target", "--output"):
        assert option in shown
    failed = subprocess.run(
        [*command, "--num-epochs", "0"], check=False, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert failed.returncode == 1
    assert failed.stderr == "error: --num-epochs 0 must be positive.\n"


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no prepared CIFAR-10 beside the repository, in ../shared/data/tfds")
def test_cifar10_trains_for_a_few_steps(tmp_path: Path) -> None:
    options = cifar10.Options(
        data_dir=CIFAR10,
        nowcaster=("linear",),
        seeds=(0,),
        num_epochs=1,
        batch_size=4600,
        snapshot_every=2,
        evaluate_every=10,
        output=tmp_path / "out",
    )

    def make_small_task(options: cifar10.Options) -> cli.Task:
        task = cifar10.make_task(options)
        assert (len(task.dataset.train.targets), len(task.dataset.validation.targets)) == (46_000, 4_000)
        assert task.dataset.train.inputs.shape[1:] == (32, 32, 3)
        small = dataclasses.replace(
            task.dataset,
            train=task.dataset.train._replace(
                inputs=task.dataset.train.inputs[:640], targets=task.dataset.train.targets[:640]
            ),
            test=task.dataset.validation,
        )
        return dataclasses.replace(task, dataset=small, batch_size=64)

    cli.run(options, make_small_task)
    assert '"num_nowcasts": 1' in (tmp_path / "out" / "linear-seed0.json").read_text()
