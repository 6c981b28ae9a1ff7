"""A training over several processes, each with two devices: what a cluster runs, on one machine.

    python -m tests.multihost_training COORDINATOR NUM_PROCESSES PROCESS_ID FOLDER NOWCASTER NUM_STEPS [KILLED_AFTER]

Saves every 4 steps, goes on from the last save, and writes the weights at the end.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import abstract_run

SAVE_EVERY = 4


def main(
    coordinator: str,
    num_processes: int,
    process_id: int,
    folder: Path,
    nowcaster: str,
    num_steps: int,
    killed_after: int,
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, process_id)
    mesh = jax.make_mesh((2 * num_processes,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax.chain(optax.adam(0.05), wnn_jax.nowcast(nowcaster, snapshot_every=2))
    shardings = {"kernel": NamedSharding(mesh, PartitionSpec("data")), "bias": NamedSharding(mesh, PartitionSpec())}

    def init() -> Any:
        kernel = jax.random.normal(jax.random.key(0), [8, 3])
        return {"kernel": kernel, "bias": jnp.zeros(3)}

    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((inputs @ params["kernel"] + params["bias"] - inputs[:, :3]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        abstract = abstract_run(tx, init, shardings)
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract["state"])
        with ocp.CheckpointManager(folder / "checkpoints") as manager:
            if manager.latest_step() is None:
                params = jax.jit(init, out_shardings=shardings)()
                state = jax.jit(tx.init, out_shardings=state_shardings)(params)
                begin = 0
            else:
                begin = manager.latest_step()
                restored = manager.restore(begin, args=ocp.args.StandardRestore(abstract))
                params, state = restored["params"], restored["state"]
            compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(shardings, state_shardings))
            for index in range(begin, num_steps):
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
        assert {leaf.sharding.spec for leaf in jax.tree.leaves(state[1].history[0]["kernel"])} == {
            PartitionSpec("data")
        }
        if process_id == 0:
            np.savez(folder / "weights.npz", **weights, num_nowcasts=np.asarray(state[1].num_nowcasts))


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
        sys.argv[5],
        int(sys.argv[6]),
        int(sys.argv[7]) if len(sys.argv) > 7 else 0,
    )
