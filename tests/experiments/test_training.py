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
import numpy as np
import pytest

from wnn_jax.meta.architectures import VanillaCNN
from wnn_jax.meta.arms import parse_arms
from wnn_jax.meta.datasets import load_digits
from wnn_jax.meta.end_to_end import Evaluation, Task, Trainer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(
        dataset=load_digits(),
        model=VanillaCNN(features=(4,), hidden=(8,)),
        augment=None,
        batch_size=128,
        num_epochs=3,
        learning_rate=3e-3,
        snapshot_every=2,
        evaluate_every=4,
        ema_decay=0.9,
    )


def run(task: Task, arm: str, folder: Path, *, seed: int = 0, scan: bool | None = None) -> dict[str, Any]:
    trainer = Trainer(task, parse_arms((arm,))[0], scan=scan)
    return trainer.run(seed, folder, lambda *_: None, checkpoint_seconds=1e9)


def test_a_run_learns_and_jumps(task: Task, tmp_path: Path) -> None:
    result = run(task, "linear", tmp_path)
    steps = [evaluation["step"] for evaluation in result["evaluations"]]
    assert steps == [4, 8, 12, 16, 20, 21]
    assert [evaluation["num_nowcasts"] for evaluation in result["evaluations"]] == [0, 0, 1, 1, 2, 2]
    before_jumps = result["evaluations"][1]
    assert before_jumps["train_loss"] < result["evaluations"][0]["train_loss"]
    assert before_jumps["accuracy"] > 0.15, "no better than chance"
    assert result["evaluations"][-1]["epoch"] == 3.0
    assert json.loads(json.dumps(result)) == result


def test_arms_share_their_beginning_and_seeds_do_not(task: Task, tmp_path: Path) -> None:
    none, linear, other = (
        run(task, arm, tmp_path / f"{arm}{seed}", seed=seed)["evaluations"]
        for arm, seed in (("none", 0), ("linear", 0), ("none", 1))
    )
    # The first jump is at step 10: up to there the two arms are one run.
    for index in (0, 1):
        assert none[index]["train_loss"] == linear[index]["train_loss"]
        assert none[index]["accuracy_ema"] == linear[index]["accuracy_ema"]
        assert none[index]["train_loss"] != other[index]["train_loss"]
    assert none[3]["train_loss"] != linear[3]["train_loss"]


def test_one_scan_equals_a_loop_of_steps(task: Task, tmp_path: Path) -> None:
    looped, scanned = (run(task, "linear", tmp_path / str(scan), scan=scan)["evaluations"] for scan in (False, True))
    for one, other in zip(looped, scanned, strict=True):
        assert one["num_nowcasts"] == other["num_nowcasts"]
        np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-3)
        np.testing.assert_allclose(one["accuracy"], other["accuracy"], atol=0.02)


def test_the_moving_average_of_the_weights_follows_jumps(task: Task) -> None:
    trainer = Trainer(dataclasses.replace(task, ema_decay=0.0), parse_arms(("linear",))[0])
    state = trainer.init(0)
    images, labels = map(jnp.asarray, task.dataset.train)
    step = jax.jit(trainer._train_step)
    for _ in range(10):
        state, _ = step(state, images, labels, jnp.arange(16), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_every_epoch_has_each_image_once_in_an_order_of_its_own(task: Task) -> None:
    trainer = Trainer(task, parse_arms(("none",))[0])
    per_epoch = task.steps_per_epoch
    first, second = (np.concatenate(list(trainer._batches(0, start, start + per_epoch))) for start in (0, per_epoch))
    assert len(set(first)) == len(first) == per_epoch * task.batch_size
    assert not np.array_equal(first, second)
    # A run that goes on from within an epoch finds the same batches there.
    resumed = next(trainer._batches(0, per_epoch + 3, per_epoch + 4))
    np.testing.assert_array_equal(resumed, second[3 * task.batch_size : 4 * task.batch_size])


def test_evaluations_survive_json() -> None:
    evaluation = Evaluation(1, 0.5, 1.25, 2.0, 0.5, 0.25, 0, 0)
    assert Evaluation(*json.loads(json.dumps(evaluation))) == evaluation


def experiment(output: Path, *arguments: str) -> list[str]:
    options = {"--nowcaster": "linear", "--seeds": 3, "--num-epochs": 20, "--snapshot-every": 7}
    flat = [str(part) for option in options.items() for part in option]
    return [
        sys.executable,
        "-m",
        "experiments.digits",
        *flat,
        "--output",
        str(output),
        *arguments,
    ]


def test_a_killed_run_goes_on_to_identical_weights(tmp_path: Path) -> None:
    # One device and the default threads, as a user's run has them.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options: dict[str, Any] = {"cwd": REPOSITORY, "env": environment, "text": True}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(experiment(undisturbed), check=True, capture_output=True, **options)

    checkpoints = killed / "checkpoints" / "linear-seed3"
    with subprocess.Popen(
        experiment(killed, "--checkpoint-seconds", "0"), stdout=subprocess.DEVNULL, **options
    ) as process:
        # Steps 21 and 28 are the third and fourth snapshots of the first window, which jumps at 35.
        while process.poll() is None and not any((checkpoints / str(step)).is_dir() for step in range(21, 280, 7)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "linear-seed3.json").exists()

    refused = subprocess.run(experiment(killed), check=False, capture_output=True, **options)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr

    resumed = subprocess.run(experiment(killed, "--resume"), check=True, capture_output=True, **options)
    first_step = int(resumed.stdout.split("step ")[1].split("/")[0])
    assert first_step > 21, "the run began anew"
    results = [json.loads((folder / "linear-seed3.json").read_text()) for folder in (undisturbed, killed)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    for one, other in zip(*(result["evaluations"] for result in results), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
