"""What nowcasting adds to an optimizer step: adam alone beside adam followed by a nowcast, in one process.

    python -m benchmarks.overhead | tee benchmarks/overhead.txt

The step is the optimizer's alone, without a model, so that the ratios are upper bounds of what a user sees. The
variants take turns step by step, with donated buffers, and medians are compared.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from wnn_jax.meta.end_to_end import environment

_SNAPSHOT_EVERY = 10
_CYCLES = 4
_CYCLE = 5 * _SNAPSHOT_EVERY


def make_params(num_weights: int) -> Any:
    """A tree of a dozen dense and convolution kernels, with biases, of about `num_weights` weights."""
    width = int((num_weights / 12) ** 0.5)
    dense = {f"Dense_{i}": {"kernel": jnp.ones([width, width]), "bias": jnp.ones([width])} for i in range(6)}
    conv = {f"Conv_{i}": {"kernel": jnp.ones([3, 3, width // 9, width]), "bias": jnp.ones([width])} for i in range(6)}
    return dense | conv


def steps(tx: optax.GradientTransformation, params: Any) -> Iterator[float]:
    """Takes steps for ever, and yields the seconds that each took."""

    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    gradient = jax.tree.map(jnp.ones_like, params)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradient).compile()
    while True:
        began = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, gradient))
        yield time.perf_counter() - began


def main() -> None:
    """Prints the table."""
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(f"Medians over {_CYCLES - 1} cycles of {_CYCLE} steps, snapshots every {_SNAPSHOT_EVERY}; ms (ratio)\n")
    print(f"{'weights':>12}  {'adam':>9}  {'nowcaster':>9}  {'ordinary step':>18}  {'snapshot':>18}  {'jump':>18}")
    nowcasters: dict[str, Any] = {"linear": "linear", "WNN": wnn_jax.nowcasters.WNN.init(jax.random.key(0))}
    for num_weights in (1_000_000, 10_000_000):
        params = make_params(num_weights)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        variants = {"adam": steps(optax.adam(1e-3), params)} | {
            name: steps(
                optax.chain(optax.adam(1e-3), wnn_jax.nowcast(nowcaster, snapshot_every=_SNAPSHOT_EVERY)), params
            )
            for name, nowcaster in nowcasters.items()
        }
        seconds = {name: np.empty(_CYCLES * _CYCLE) for name in variants}
        for index in range(_CYCLES * _CYCLE):
            for name, variant in variants.items():
                seconds[name][index] = next(variant)
        position = np.arange(_CYCLES * _CYCLE)[_CYCLE:] % _CYCLE
        is_snapshot, is_jump = position % _SNAPSHOT_EVERY == _SNAPSHOT_EVERY - 1, position == _CYCLE - 1
        adam = np.median(seconds["adam"][_CYCLE:])
        for name in nowcasters:
            timed = seconds[name][_CYCLE:]
            kinds = (timed[~is_snapshot], timed[is_snapshot & ~is_jump], timed[is_jump])
            cells = [f"{np.median(kind) * 1e3:9.2f} ({np.median(kind) / adam:6.2f})" for kind in kinds]
            print(f"{count:12,}  {adam * 1e3:9.2f}  {name:>9}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
