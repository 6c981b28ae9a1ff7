"""Parameters of each network library. Users' training loops with them are in `tests/docs/test_recipes.py`."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import wnn_jax
from tests.helpers import assert_trees_close, compile_step, identity, pull_to_one, train

SNAPSHOT_EVERY = 2
NUM_STEPS = 5 * SNAPSHOT_EVERY + 3  # past one jump of a window
IMAGES = jnp.zeros((1, 6, 6, 2))


def linen_params() -> Any:
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.Dense(1)])
    return jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]


def nnx_params() -> Any:
    rngs = nnx.Rngs(0)
    return nnx.state(nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.Linear(4, 1, rngs=rngs)), nnx.Param)


def equinox_params() -> Any:
    encode, decode = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Conv2d(2, 4, 3, key=encode), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(4, 1, key=decode)]
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_inexact_array)


def haiku_params() -> Any:
    model = hk.transform(lambda images: hk.Linear(1)(hk.Conv2D(4, 3)(images)))
    return jax.jit(model.init)(jax.random.key(0), IMAGES)


# A jump that tells the roles apart, along and away from where the weights were going.
JUMPS = {"conv": 1.0, "dense": -1.0, "bias": 0.5}
by_role = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + JUMPS[role] * (history[-1] - history[0]))


@pytest.mark.parametrize("make_params", [linen_params, nnx_params, equinox_params, haiku_params])
def test_jumps_are_those_of_the_roles(make_params: Any):
    params = make_params()
    roles = wnn_jax.default_roles(params)
    assert set(jax.tree.leaves(roles)) == set(JUMPS)
    sgd = optax.sgd(0.1)
    steps = train(optax.chain(sgd, wnn_jax.nowcast(by_role, snapshot_every=SNAPSHOT_EVERY)), params, NUM_STEPS)
    assert steps[-1].state[1].num_nowcasts == 1

    step, state, window = compile_step(sgd, pull_to_one, identity), sgd.init(params), list[Any]()
    for number in range(1, NUM_STEPS + 1):
        _, params, state = step(params, state)
        if number % SNAPSHOT_EVERY == 0:
            window.append(params)
        if number == 5 * SNAPSHOT_EVERY:
            params = by_role(window, roles, None)
    assert_trees_close(steps[-1].params, params)


def test_a_model_with_functions_in_it_is_refused_with_the_remedy():
    model: Any = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"a leaf of type \w+ at .*eqx\.filter\(model, eqx\.is_inexact"):
        wnn_jax.nowcast().init(model)
    wnn_jax.nowcast().init(eqx.filter(model, eqx.is_inexact_array))
