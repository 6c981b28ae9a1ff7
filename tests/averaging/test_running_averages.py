from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import assert_trees_close, assert_trees_equal, network_params, train
from wnn_jax import averaging

TRANSFORMS = {
    "uniform": (lambda: averaging.uniform(2, 3), averaging.uniform_eval_params),
    "lawa": (lambda: averaging.lawa(2, 3, 2), averaging.lawa_eval_params),
    "ema": (lambda: averaging.ema(0.7), averaging.ema_eval_params),
}


@pytest.fixture(params=TRANSFORMS)
def kind(request: pytest.FixtureRequest) -> Any:
    return TRANSFORMS[request.param]


def trained(tx: Any, num_steps: int, params: Any = None) -> Any:
    return train(optax.chain(optax.sgd(0.1), tx), network_params() if params is None else params, num_steps)


def run(tx: Any, updates: list[Any], params: Any) -> Any:
    """The state after each of these updates of the same parameters."""
    update = jax.jit(tx.update)
    states = [tx.init(params)]
    for tree in updates:
        states.append(update(tree, states[-1], params)[1])
    return states


def assert_average(actual: Any, trees: list[Any], weights: Any = None) -> None:
    expected = jax.tree.map(lambda *leaves: np.average(np.asarray(leaves, np.float64), 0, weights), *trees)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.parametrize("num_steps", [4, 5, 16])
@pytest.mark.parametrize(("name", "size"), [("uniform", None), ("lawa", 2)])
def test_averages_of_every_third_step(name: str, size: int | None, num_steps: int):
    make, read = TRANSFORMS[name]
    steps = trained(make(), num_steps)
    # From step 2 on every third: steps 4, 7, 10, 13, counted from 0.
    taken = [step.params for step in steps[4::3]][-size if size else 0 :]
    assert_average(read(steps[-1].state, steps[-1].params), taken or [steps[-1].params])


@pytest.mark.parametrize("num_steps", [1, 2, 9])
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_the_exponential_average(num_steps: int, decay: float):
    steps = trained(averaging.ema(decay), num_steps)
    weights = (1 - decay) * decay ** np.arange(num_steps)[::-1]
    actual = averaging.ema_eval_params(steps[-1].state, steps[-1].params)
    assert_average(actual, [step.params for step in steps], weights)


def test_training_is_left_alone(kind: Any):
    make, read = kind
    params = network_params()
    assert_trees_equal(read(make().init(params), params), params)
    assert_trees_equal(trained(make(), 9)[-1].params, trained(optax.identity(), 9)[-1].params)
    with pytest.raises(ValueError, match="params"):
        make().update(params, make().init(params))


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), ("float64", "float64")])
def test_averages_are_of_float32_at_least(kind: Any, dtype: str, wide: str):
    make, read = kind
    with jax.enable_x64(True):
        steps = trained(make(), 9, network_params(jnp.dtype(dtype)))
        average = read(steps[-1].state, steps[-1].params)
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype(dtype)}
    if read is not averaging.lawa_eval_params:
        assert {leaf.dtype for leaf in jax.tree.leaves(steps[-1].state[1].average)} == {jnp.dtype(wide)}


def test_shards_stay_where_they_are(kind: Any):
    make, read = kind
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "x"))),
            network_params(),
        )
        steps = trained(make(), 9, params)
        average = read(steps[-1].state, steps[-1].params)
        assert jax.tree.map(jax.typeof, average) == jax.tree.map(jax.typeof, params)
    expected = trained(make(), 9)
    assert_trees_close(jax.device_get(average), read(expected[-1].state, expected[-1].params))


def test_the_average_is_found_in_a_chain(kind: Any):
    make, read = kind
    params = network_params()
    others = [other() for other, other_read in TRANSFORMS.values() if other_read is not read]
    nested = optax.chain(optax.chain(optax.sgd(0.1), make()), *others).init(params)
    assert_trees_equal(read(nested, params), params)
    with pytest.raises(ValueError, match=r"state has 0 of \w+State; give the state of a chain with one"):
        read(optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"state has 2 of"):
        read(optax.chain(make(), make()).init(params), params)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_left_out_and_counted(kind: Any, bad: float):
    """Steps that do not count are not counted either."""
    make, read = kind
    params = {"w": jnp.zeros(4), "b": jnp.zeros(2)}
    updates = [{"w": jnp.full(4, float(t)), "b": jnp.ones(2)} for t in range(12)]
    broken = {5, 6, 7} if read is not averaging.ema_eval_params else {7}
    for t in broken:
        updates[t]["w"] = updates[t]["w"].at[2].set(bad)
    state = run(make(), updates, params)[-1]
    assert state.num_rejected == 1
    counted = range(12) if read is averaging.ema_eval_params else (4, 10)
    good = [updates[t] for t in counted if t not in broken]
    assert_average(read(state, params), good, 0.7 ** np.arange(11)[::-1] if len(good) > 2 else None)


def test_averages_are_between_the_most_distant_weights(kind: Any):
    make, read = kind
    largest = float(jnp.finfo(jnp.float32).max)
    params = {"w": jnp.zeros(3)}
    updates = [{"w": jnp.array([largest, largest * (-1) ** t, 0.1])} for t in range(12)]
    average = read(run(make(), updates, params)[-1], params)["w"]
    assert average[0] == jnp.float32(largest)
    assert abs(average[1]) < largest
    assert average[2] == jnp.float32(0.1)


def test_complex_weights_and_integers_are_averaged(kind: Any):
    make, read = kind
    params = {"w": jnp.zeros(2, jnp.complex64), "n": jnp.zeros([], jnp.int32)}
    average = read(run(make(), [{"w": jnp.full(2, 1 + 2j), "n": jnp.array(3)}] * 6, params)[-1], params)
    np.testing.assert_allclose(average["w"], 1 + 2j, rtol=1e-6)
    assert average["n"] == 3


@pytest.mark.parametrize("name", ["uniform", "lawa"])
def test_seeds_at_different_steps_equal_separate_runs(name: str):
    """On a step, some members of a batch may count and others not."""
    make, read = TRANSFORMS[name]
    update = jax.jit(jax.vmap(make().update))
    seeds = [jax.tree.map(lambda leaf, seed=seed: leaf + seed, network_params()) for seed in range(3)]
    runs = [trained(make(), 12, params)[seed:] for seed, params in enumerate(seeds)]

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    state = stack([run[0].state[1] for run in runs])
    for t in range(1, 10):
        params = stack([run[t].params for run in runs])
        _, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
    expected = [read(run[9].state, run[9].params) for run in runs]
    assert_trees_close(jax.vmap(read)(state, stack([run[9].params for run in runs])), stack(expected))
