"""Training loops as each library's users write them, against one loop written by hand.

With the default nowcaster they are run as recipes, in `tests/docs/test_recipes.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import wnn_jax
from tests.helpers import assert_trees_close, num_jumps

SNAPSHOT_EVERY = 2
NUM_STEPS = 5 * SNAPSHOT_EVERY + 3  # past one jump of a window
IMAGES = jax.random.normal(jax.random.key(1), (8, 6, 6, 2))
TARGETS = jnp.sin(jnp.arange(8.0))


class Run(NamedTuple):
    """A finished run.

    Attributes:
      loss: of params.
      initial: the params at its start.
      final: the params at its end.
      state: the optimizer's state at its end.
    """

    loss: Callable[[Any], jax.Array]
    initial: Any
    final: Any
    state: Any


def base_optimizer() -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.adam(0.01))


def squared_error(predictions: jax.Array) -> jax.Array:
    return jnp.mean((predictions[:, 0] - TARGETS) ** 2)


def run_linen(tx: optax.GradientTransformationExtraArgs) -> Run:
    model = nn.Sequential([nn.Conv(4, (3, 3)), jnp.tanh, lambda x: x.reshape(8, -1), nn.Dense(1)])
    initial = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]

    def loss(params: Any) -> jax.Array:
        return squared_error(model.apply({"params": params}, IMAGES))  # pyright: ignore[reportArgumentType]

    @jax.jit
    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = TrainState.create(apply_fn=model.apply, params=initial, tx=tx)
    for _ in range(NUM_STEPS):
        state = step(state)
    return Run(loss, initial, state.params, state.opt_state)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.decode = nnx.Linear(144, 1, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(jnp.tanh(self.encode(images)).reshape(8, -1))


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def run_nnx(tx: optax.GradientTransformationExtraArgs) -> Run:
    model = NnxModel(nnx.Rngs(0))
    graph, initial = nnx.split(model, nnx.Param)
    initial = jax.tree.map(jnp.copy, initial)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def model_loss(model: NnxModel) -> jax.Array:
        return squared_error(model(IMAGES))

    @nnx.jit
    def step(model: NnxModel, optimizer: nnx.Optimizer[NnxModel]) -> None:
        optimizer.update(model, nnx.grad(model_loss)(model))

    for _ in range(NUM_STEPS):
        step(model, optimizer)
    return Run(
        loss=lambda params: model_loss(nnx.merge(graph, params)),
        initial=initial,
        final=nnx.state(model, nnx.Param),
        state=jax.tree.map(lambda variable: variable[...], optimizer.opt_state, is_leaf=is_variable),
    )


class EquinoxModel(eqx.Module):
    encode: eqx.nn.Conv2d
    decode: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.encode = eqx.nn.Conv2d(2, 4, 3, key=keys[0])
        self.decode = eqx.nn.Linear(64, 1, key=keys[1])

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.decode(jnp.tanh(self.encode(image)).reshape(-1))


def run_equinox(tx: optax.GradientTransformationExtraArgs) -> Run:
    model = EquinoxModel(jax.random.key(0))
    initial, static = eqx.partition(model, eqx.is_inexact_array)

    def model_loss(model: EquinoxModel) -> jax.Array:
        return squared_error(jax.vmap(model)(jnp.moveaxis(IMAGES, -1, 1)))

    @eqx.filter_jit
    def step(model: EquinoxModel, state: Any) -> tuple[EquinoxModel, Any]:
        gradient = eqx.filter_grad(model_loss)(model)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(initial)
    for _ in range(NUM_STEPS):
        model, state = step(model, state)
    return Run(
        loss=lambda params: model_loss(eqx.combine(params, static)),
        initial=initial,
        final=eqx.filter(model, eqx.is_inexact_array),
        state=state,
    )


def run_haiku(tx: optax.GradientTransformationExtraArgs) -> Run:
    @hk.without_apply_rng
    @hk.transform
    def model(images: jax.Array) -> jax.Array:
        return hk.Linear(1)(hk.Flatten()(jnp.tanh(hk.Conv2D(4, 3)(images))))

    def loss(params: Any) -> jax.Array:
        return squared_error(model.apply(params, IMAGES))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    initial = params = jax.jit(model.init)(jax.random.key(0), IMAGES)
    state = tx.init(params)
    for _ in range(NUM_STEPS):
        params, state = step(params, state)
    return Run(loss, initial, params, state)


def train_by_hand(run: Run, visit: Callable[[Any, Any], Any]) -> Any:
    """The same run, with the jumps made outside of the optimizer: by `visit`, of the parameters and their roles."""
    tx = base_optimizer()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(run.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = run.initial, tx.init(run.initial)
    for number in range(1, NUM_STEPS + 1):
        params, state = step(params, state)
        if number % SNAPSHOT_EVERY == 0:
            roles = wnn_jax.default_roles(params)
            assert set(jax.tree.leaves(roles)) == set(JUMPS)
            params = visit(params, roles)
    return params


def window_by_hand(nowcaster: wnn_jax.Nowcaster) -> Callable[[Any, Any], Any]:
    window: list[Any] = []

    def visit(params: Any, roles: Any) -> Any:
        window.append(params)
        if len(window) < nowcaster.context:
            return params
        prediction = jax.jit(lambda window: nowcaster(window, roles, None))(window)
        window.clear()
        return prediction

    return visit


# A jump that tells the roles apart, along and away from where the weights were going.
JUMPS = {"conv": 1.0, "dense": -1.0, "bias": 0.5}
by_role = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + JUMPS[role] * (history[-1] - history[0]))


def assert_runs_with_jumps(run_framework: Callable[..., Run], nowcaster: Any, visit: Callable[[Any, Any], Any]) -> None:
    run = run_framework(optax.chain(base_optimizer(), wnn_jax.nowcast(nowcaster, snapshot_every=SNAPSHOT_EVERY)))
    state = run.state[-1]
    assert isinstance(state, wnn_jax.NowcastState)
    counts = (int(state.count), int(state.num_nowcasts), int(state.num_rejected))
    assert counts == (NUM_STEPS, num_jumps(nowcaster, NUM_STEPS // SNAPSHOT_EVERY), 0)
    assert_trees_close(run.final, train_by_hand(run, visit), rtol=1e-5, atol=5e-6)


FRAMEWORKS = [run_linen, run_nnx, run_equinox, run_haiku]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("run_framework", FRAMEWORKS)
def test_a_run_with_a_jump(run_framework: Callable[..., Run]):
    assert_runs_with_jumps(run_framework, by_role, window_by_hand(by_role))


def test_a_run_with_a_jump_of_the_network(wnn: wnn_jax.Nowcaster):
    assert_runs_with_jumps(run_haiku, wnn, window_by_hand(wnn))


def test_a_model_with_functions_in_it_is_refused_with_the_remedy():
    model: Any = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"a leaf of type \w+ at .*eqx\.filter\(model, eqx\.is_inexact"):
        wnn_jax.nowcast().init(model)
    wnn_jax.nowcast().init(eqx.filter(model, eqx.is_inexact_array))
