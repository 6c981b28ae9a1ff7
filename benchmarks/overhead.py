"""What nowcasting adds to training steps: adam alone beside adam followed by a nowcast, in one process.

    python -m benchmarks.overhead | tee benchmarks/overhead.txt

A step is one of a whole training: an MLP's loss and gradients on a batch, the optimizer, and the new parameters, with
donated buffers. Below it the optimizer alone, on gradients that are given: there the updates, which a conditional may
replace, are written and read once more, where adam alone never writes them, so that its ratios are upper bounds. The
variants take turns step by step, and medians are compared.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from wnn_jax.lab.training.keys import made_by

_SNAPSHOT_EVERY = 10
_CYCLE = 5 * _SNAPSHOT_EVERY
# Layers, width, and rows in a batch.
_MODELS = {"1M": (8, 350, 1024), "10M": (8, 1120, 1024), "100M": (8, 3536, 256)}


def make_params(num_layers: int, width: int) -> Any:
    """The parameters of an MLP."""
    key = jax.random.key(0)
    return {
        f"Dense_{layer}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, layer), [width, width]) / width**0.5,
            "bias": jnp.zeros([width]),
        }
        for layer in range(num_layers)
    }


def loss_fn(params: Any, inputs: jax.Array) -> jax.Array:
    """A loss on a batch."""
    x = inputs
    for layer in params.values():
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - inputs) ** 2)


def steps(tx: optax.GradientTransformation, params: Any, inputs: jax.Array | None) -> Iterator[float]:
    """Takes steps for ever, and yields the seconds that each took."""

    def step(params: Any, state: Any, given: Any) -> Any:
        gradient = given if inputs is None else jax.grad(loss_fn)(params, inputs)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    given = jax.tree.map(jnp.ones_like, params) if inputs is None else None
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, given).compile()
    while True:
        began = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, given))
        yield time.perf_counter() - began


def compare(name: str, model: tuple[int, int, int], num_cycles: int, *, whole: bool) -> None:
    """Prints the lines of one model."""
    num_layers, width, batch_size = model
    params = make_params(num_layers, width)
    inputs = jax.random.normal(jax.random.key(1), [batch_size, width]) if whole else None
    nowcasters = {
        "slow-drift": {},
        "drift": {},
        "drift, bf16": {"history_dtype": jnp.bfloat16},
        "linear": {},
        "pooled-linear": {},
        "pooled-linear, bf16": {"history_dtype": jnp.bfloat16},
    }
    variants = {"adam": steps(optax.adam(1e-4), params, inputs)}
    for label, options in nowcasters.items():
        nowcast = wnn_jax.nowcast(label.split(",")[0], snapshot_every=_SNAPSHOT_EVERY, **options)
        variants[label] = steps(optax.chain(optax.adam(1e-4), nowcast), params, inputs)
    copy = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 0, tree))
    seconds = {label: np.empty(num_cycles * _CYCLE) for label in [*variants, "copy"]}
    for index in range(num_cycles * _CYCLE):
        for label, variant in variants.items():
            seconds[label][index] = next(variant)
        began = time.perf_counter()
        jax.block_until_ready(copy(params))
        seconds["copy"][index] = time.perf_counter() - began
    position = np.arange(num_cycles * _CYCLE) % _CYCLE
    is_visit = position % _SNAPSHOT_EVERY == _SNAPSHOT_EVERY - 1
    # The first steps fill buffers.
    is_ordinary = ~is_visit & (np.arange(num_cycles * _CYCLE) >= _SNAPSHOT_EVERY)
    adam = np.median(seconds["adam"][is_ordinary])
    one_copy = np.median(seconds["copy"])
    for label in nowcasters:
        # A drift jumps at every visit.
        is_jump = is_visit if "drift" in label else position == _CYCLE - 1
        is_snapshot = is_visit & ~is_jump
        ordinary, jump = (float(np.median(seconds[label][kind])) for kind in (is_ordinary, is_jump))
        snapshot = float(np.median(seconds[label][is_snapshot])) if is_snapshot.any() else ordinary
        shares = np.array([np.mean(~is_visit), np.mean(is_snapshot), np.mean(is_jump)])
        every_step = shares @ [ordinary, snapshot, jump]
        print(
            f"{'training' if whole else 'optimizer':>9}  {name:>5}  {label:>21}  {adam * 1e3:8.1f}"
            f"  {ordinary / adam:8.3f}  {(snapshot - ordinary) / one_copy:8.2f}  {jump * 1e3:9.1f}"
            f"  {every_step / adam:8.3f}",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    print(", ".join(f"{name} {value}" for name, value in made_by().items()))
    batches = ", ".join(f"{name}: {model[-1]}" for name, model in _MODELS.items())
    print(f"MLPs, rows in a batch: {batches}; snapshots every {_SNAPSHOT_EVERY} steps; medians, variants in turns.\n")
    print(f"{'':>9}  {'':>5}  {'':>21}  {'adam':>8}  {'ordinary':>8}  {'snapshot':>8}  {'jump':>9}  {'all':>8}")
    units = f"{'ms':>8}  {'/ adam':>8}  {'copies':>8}  {'ms':>9}  {'/ adam':>8}"
    print(f"{'step':>9}  {'model':>5}  {'nowcaster':>21}  {units}")
    for (name, model), whole in itertools.product(_MODELS.items(), (True, False)):
        compare(name, model, 1 if name == "100M" else 4, whole=whole)
    print(
        "\nsnapshot: the time of a step that records one beyond that of an ordinary step, in copies of the parameters"
        "\nall: a step on the mean, with its share of snapshots and jumps"
    )


if __name__ == "__main__":
    main()
