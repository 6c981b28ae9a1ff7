"""Save and resume with Orbax, bit for bit.

- Save the parameters together with the optimizer's state, which contains the history. Without a history, the next jump
  comes later.
- Orbax needs shapes and dtypes to restore. `jax.eval_shape` of `init` gives them without making an array.
- After a restart, each step must get the same batch as before. Derive its key from the number of the step, or save the
  key too.
"""

import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500
NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def main(num_steps: int = 300, interrupted_after: int = 155, nowcaster: str = "drift") -> dict[str, float]:
    """Train with and without an interruption. Return accuracy, counts, and whether every bit is the same."""
    tx = optax.chain(optax.adam(3e-3), wnn_jax.nowcast(nowcaster))

    def init() -> dict[str, Any]:
        params = NETWORK.init(jax.random.key(0), IMAGES[:1])
        return {"params": params, "opt_state": tx.init(params)}

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits = NETWORK.apply(params, IMAGES[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()

    @jax.jit
    def train_step(training: dict[str, Any], step: int) -> dict[str, Any]:
        gradient = jax.grad(loss_fn)(training["params"], jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN))
        updates, opt_state = tx.update(gradient, training["opt_state"], training["params"])
        return {"params": optax.apply_updates(training["params"], updates), "opt_state": opt_state}

    def train(training: dict[str, Any], steps: range) -> dict[str, Any]:
        for step in steps:
            training = train_step(training, step)
        return training

    undisturbed = train(jax.jit(init)(), range(num_steps))
    with tempfile.TemporaryDirectory() as folder:
        with ocp.CheckpointManager(Path(folder)) as manager:
            manager.save(
                interrupted_after, args=ocp.args.StandardSave(train(jax.jit(init)(), range(interrupted_after)))
            )
        with ocp.CheckpointManager(Path(folder)) as manager:
            step = manager.latest_step() or 0
            restored = manager.restore(step, args=ocp.args.StandardRestore(jax.eval_shape(init)))
    resumed = train(restored, range(step, num_steps))

    is_right = jnp.argmax(jax.jit(NETWORK.apply)(resumed["params"], IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(undisturbed), strict=True)
    return {
        "accuracy": float(is_right.mean()),
        "is_identical": all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs),
        **jax.tree.map(float, wnn_jax.metrics(resumed["opt_state"])),
    }


if __name__ == "__main__":
    print(main())
