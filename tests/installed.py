"""What a user has who installed wnn_jax without extras: `make dist` runs this in an environment with nothing else.

python -I tests/installed.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import wnn_jax


def check_nowcasts() -> None:
    tx = optax.chain(optax.adam(1e-2), wnn_jax.nowcast())
    params: Any = {"kernel": jnp.ones([3, 2]), "bias": jnp.ones([2])}
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any) -> Any:
        gradient = jax.grad(lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)))(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(40):
        params, opt_state = train_step(params, opt_state)
    assert wnn_jax.metrics(opt_state)["num_nowcasts"] == 3


def check_names() -> None:
    names = wnn_jax.available()
    assert {"pooled-linear", "wnn", "wnn-plus", "drift"} <= set(names)
    for name in names:
        wnn_jax.load(name)


def check_command() -> None:
    command = subprocess.run([Path(sys.prefix) / "bin" / "wnn-jax", "--help"], capture_output=True, text=True)
    assert command.returncode == 1
    assert command.stderr.endswith("install with: pip install 'wnn-jax[lab]'\n")
    assert command.stderr.count("\n") == 1


if __name__ == "__main__":
    assert Path(wnn_jax.__file__).is_relative_to(sys.prefix), f"{wnn_jax.__file__} is not what was installed"
    check_nowcasts()
    check_names()
    check_command()
    print(f"wnn_jax {wnn_jax.__version__} with jax {jax.__version__} runs as installed")
