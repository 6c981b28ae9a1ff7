"""Several processes under `jax.distributed`: train, forecast, save, lose a process, start again."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

NUM_STEPS = 22


def start(folder: Path, nowcaster: str, *, killed_after: int = 0) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    folder.mkdir(exist_ok=True)
    shared = (coordinator, "2")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multihost_training", *shared, str(process), str(folder), nowcaster, *last],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for process, last in enumerate(([str(NUM_STEPS)], [str(NUM_STEPS), str(killed_after)]))
    ]


def run(folder: Path, nowcaster: str) -> dict[str, np.ndarray]:
    processes = start(folder, nowcaster)
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-3000:]
    with np.load(folder / "weights.npz") as file:
        return dict(file)


# Of a window two jumps, after 10 and 20 steps; of a drift ten, after every second step but the first of them.
@pytest.mark.slow
@pytest.mark.parametrize(("nowcaster", "expected_jumps"), [("adaptive-linear", 2), ("drift", 10)])
def test_a_killed_process_changes_nothing(tmp_path: Path, nowcaster: str, expected_jumps: int):
    undisturbed = run(tmp_path / "undisturbed", nowcaster)
    assert undisturbed["num_nowcasts"] == expected_jumps

    other, victim = start(tmp_path / "killed", nowcaster, killed_after=13)
    victim.communicate(timeout=240)
    assert victim.returncode == -signal.SIGKILL
    # It waits for the other for ever, or until the coordinator notices.
    other.kill()
    other.communicate(timeout=60)
    assert not (tmp_path / "killed" / "weights.npz").exists()
    assert (tmp_path / "killed" / "checkpoints" / "12").exists()

    resumed = run(tmp_path / "killed", nowcaster)
    for name, expected in undisturbed.items():
        np.testing.assert_array_equal(resumed[name], expected)
