"""Mesh of devices: shard parameters, moments and history.

- The history takes the shardings of the parameters that you pass to `init`. Under `jit` with automatic axes, pass
  `out_shardings` too. [Train on several hosts](../guides/several-hosts.md) has the code.
- No weight leaves its device for a forecast. If a matrix is sharded, each device orthogonalises its own part. So the
  jumps of the default depend a little on the sharding.
- A CPU can act as several devices: call `jax.config.update("jax_num_cpu_devices", 8)` before you make the first array.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import wnn_jax

NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
NUM_TRAIN = 1500


def main(num_steps: int = 200, nowcaster: str = "drift") -> dict[str, float]:
    """Train on all devices. Return the test accuracy, the share of the history on each device, and the counts."""
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16), jnp.asarray(digits.target)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    params = jax.jit(NETWORK.init)(jax.random.key(0), images[:1])
    # Kernels are sharded by rows. Biases are small, so every device has them whole.
    shardings = jax.tree.map(lambda leaf: over_rows if leaf.ndim == 2 else everywhere, params)
    params = jax.device_put(params, shardings)
    tx = optax.chain(optax.adam(3e-3), wnn_jax.nowcast(nowcaster))
    opt_state = tx.init(params)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(NETWORK.apply(params, images), labels).mean()

    @jax.jit
    def train_step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, images, labels), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in range(num_steps):
        rows = jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN)
        batch = jax.device_put((images[rows], labels[rows]), over_rows)
        params, opt_state = train_step(params, opt_state, *batch)

    is_right = jnp.argmax(jax.jit(NETWORK.apply)(params, images[NUM_TRAIN:]), axis=-1) == labels[NUM_TRAIN:]
    kernels = [leaf for leaf in jax.tree.leaves(opt_state[-1].history) if leaf.ndim == 2]
    return {
        "accuracy": float(is_right.mean()),
        "share_of_history": max(kernel.addressable_shards[0].data.size / kernel.size for kernel in kernels),
        "num_devices": jax.device_count(),
        **jax.tree.map(float, wnn_jax.metrics(opt_state)),
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # No effect on an accelerator.
    print(main())
