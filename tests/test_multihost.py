"""Several processes under `jax.distributed`: train, forecast, save, lose a process, start again.

Each process runs this file as `python -m tests.test_multihost COORDINATOR PROCESS FOLDER NOWCASTER [KILLED_AFTER]`. It
has two devices, saves every 4 steps, goes on from the last save, and the first process writes the weights at the end.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import abstract_run

NUM_STEPS, SAVE_EVERY, NUM_PROCESSES = 22, 4, 2


def start(folder: Path, nowcaster: str, *, killed_after: int = 0) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    folder.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_multihost", coordinator, str(process), str(folder), nowcaster, *last],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for process, last in enumerate(([], [str(killed_after)]))
    ]


def run(folder: Path, nowcaster: str) -> dict[str, np.ndarray]:
    for process in start(folder, nowcaster):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-3000:]
    with np.load(folder / "weights.npz") as file:
        return dict(file)


# A window jumps after 10 and 20 steps, a drift after every second step but the first of these.
@pytest.mark.slow
@pytest.mark.parametrize(("nowcaster", "expected_jumps"), [("wnn", 2), ("drift", 10)])
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


def main(coordinator: str, process_id: int, folder: Path, nowcaster: str, killed_after: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, NUM_PROCESSES, process_id)
    mesh = jax.make_mesh((2 * NUM_PROCESSES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.chain(optax.adam(0.05), wnn_jax.nowcast(nowcaster, snapshot_every=2))
    shardings = {"kernel": NamedSharding(mesh, PartitionSpec("data")), "bias": NamedSharding(mesh, PartitionSpec())}

    def init() -> Any:
        return {"kernel": jax.random.normal(jax.random.key(0), [8, 3]), "bias": jnp.zeros(3)}

    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((inputs @ params["kernel"] + params["bias"] - inputs[:, :3]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        abstract = abstract_run(tx, init, shardings)
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract["state"])
        with ocp.CheckpointManager(folder / "checkpoints") as manager:
            begin = manager.latest_step() or 0
            if begin == 0:
                params = jax.jit(init, out_shardings=shardings)()
                state = jax.jit(tx.init, out_shardings=state_shardings)(params)
            else:
                restored = manager.restore(begin, args=ocp.args.StandardRestore(abstract))
                params, state = restored["params"], restored["state"]
            compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings))
            for index in range(begin, NUM_STEPS):
                everywhere = np.asarray(jax.random.normal(jax.random.key(index), [16, 8]))
                inputs = jax.make_array_from_callback(
                    everywhere.shape, NamedSharding(mesh, PartitionSpec("data")), lambda where, x=everywhere: x[where]
                )
                params, state = compiled(params, state, inputs)
                if (index + 1) % SAVE_EVERY == 0:
                    manager.save(index + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
                    manager.wait_until_finished()
                if index + 1 == killed_after:
                    jax.block_until_ready(params)
                    os.kill(os.getpid(), signal.SIGKILL)
        weights = multihost_utils.process_allgather(params, tiled=True)
        kept = [leaf for leaf in jax.tree.leaves(state[1].history) if leaf.ndim == 2]
        assert {leaf.sharding.spec for leaf in kept} == {PartitionSpec("data")}
        if process_id == 0:
            np.savez(folder / "weights.npz", **weights, num_nowcasts=np.asarray(state[1].num_nowcasts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]) if len(sys.argv) > 5 else 0)
