"""Transformer: combine warm-up, cosine, clipping, weight decay and gradient accumulation.

- Clipping, decay and schedule belong to the optimizer's own step. Accumulation makes one step of four calls. `nowcast`
  comes last and counts calls, so a visit every 40 calls is a visit every 10 steps.
- If the learning rate decays, the optimizer's steps get shorter, and the jumps with them.
- Start with the learning rate that is best without `nowcast`. Then try half of it and a quarter of it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.images / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500
ACCUMULATE = 4


class Transformer(nn.Module):
    """A transformer with one block over the eight rows of an image, and a classifier."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of images `[batch, 8, 8]`."""
        positions = self.param("position_embedding", nn.initializers.normal(0.02), (8, 32))
        x = nn.Dense(32, use_bias=False)(images) + positions
        x += nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False)(nn.LayerNorm(use_bias=False)(x))
        hidden = nn.gelu(nn.Dense(64, use_bias=False)(nn.LayerNorm(use_bias=False)(x)))
        x += nn.Dense(32, use_bias=False)(hidden)
        return nn.Dense(10)(nn.LayerNorm(use_bias=False)(x).mean(axis=1))


def main(num_steps: int = 200, nowcaster: str = "drift") -> dict[str, float]:
    """Train for some optimizer steps, and return the test accuracy and the counts of `nowcast`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=num_steps // 10, decay_steps=num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    tx = optax.chain(
        optax.MultiSteps(optimizer, ACCUMULATE).gradient_transformation(),
        wnn_jax.nowcast(nowcaster, snapshot_every=10 * ACCUMULATE),
    )
    model = Transformer()
    params = jax.jit(model.init)(jax.random.key(0), IMAGES[:1])["params"]
    opt_state = tx.init(params)

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, IMAGES[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()

    @jax.jit
    def train_step(params: Any, opt_state: Any, rows: jax.Array) -> tuple[Any, Any]:
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, rows), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in range(num_steps * ACCUMULATE):
        params, opt_state = train_step(params, opt_state, jax.random.randint(jax.random.key(step), [32], 0, NUM_TRAIN))

    logits = jax.jit(model.apply)({"params": params}, IMAGES[NUM_TRAIN:])
    is_right = jnp.argmax(logits, axis=-1) == LABELS[NUM_TRAIN:]
    return {"accuracy": float(is_right.mean()), **jax.tree.map(float, wnn_jax.metrics(opt_state))}


if __name__ == "__main__":
    print(main())
