import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_trees_close, assert_trees_equal
from tests.late_phase.test_late_phase import member_of
from wnn_jax.late_phase import (
    RankOne,
    SplitParams,
    average_members,
    late_phase,
    migrate_state,
    rank_one_mask,
    select_member,
    split_members,
)

NUM_MEMBERS = 3


class Factored(nn.Module):
    """A network that multiplies what comes into its layers and what goes out by factors, or does not."""

    @nn.compact
    def __call__(self, x: jax.Array, factors: Any = None) -> jax.Array:
        x = nn.relu(_multiplied(nn.Conv(3, (2, 2)), x, factors and factors["Conv_0"]["kernel"]))
        return _multiplied(nn.Dense(2, use_bias=False), x.mean(axis=(1, 2)), factors and factors["Dense_0"]["kernel"])


def _multiplied(layer: nn.Module, x: jax.Array, factors: RankOne | None) -> jax.Array:
    if factors is None:
        return layer(x)
    inputs, outputs = (factor.reshape([1] * (x.ndim - 1) + [-1]) for factor in factors)
    bias = layer(jnp.zeros_like(x))
    return (layer(x * inputs) - bias) * outputs + bias


def factored(noise_scale: float = 0.5) -> tuple[Any, SplitParams]:
    params = Factored().init(jax.random.key(0), jnp.zeros([1, 4, 4, 2]))["params"]
    return params, split_members(params, rank_one_mask, jax.random.key(1), noise_scale, num_members=NUM_MEMBERS)


def test_factors_begin_as_the_network_that_is_there():
    params, members = factored(noise_scale=0.0)
    assert jax.tree.map(jnp.shape, members.members) == {
        "Conv_0": {"bias": optax.MaskedNode(), "kernel": RankOne((NUM_MEMBERS, 2), (NUM_MEMBERS, 3))},
        "Dense_0": {"kernel": RankOne((NUM_MEMBERS, 3), (NUM_MEMBERS, 2))},
    }
    assert_trees_equal(members.base, params)
    assert_trees_equal(select_member(members, 1), params)
    assert_trees_equal(average_members(members)[0], params)


def test_folded_factors_are_those_of_inputs_and_outputs():
    """Exactly, where the numbers are such that float32 rounds none of the products and sums."""
    params, members = factored()
    params, split = jax.tree.map(lambda leaf: jnp.round(4 * leaf), (params, members))
    images = jnp.round(3 * jax.random.normal(jax.random.key(2), [4, 4, 4, 2]))
    for member in range(NUM_MEMBERS):
        expected = Factored().apply({"params": params}, images, member_of(split, member))
        np.testing.assert_array_equal(Factored().apply({"params": select_member(split, member)}, images), expected)
    mean = jax.tree.map(lambda leaf: jnp.round(leaf.mean(axis=0)), members.members)
    average, _ = average_members(SplitParams(params, jax.tree.map(lambda leaf: leaf[None], mean)))
    expected = Factored().apply({"params": params}, images, mean)
    np.testing.assert_array_equal(Factored().apply({"params": average}, images), expected)


@pytest.mark.parametrize("schedule", ["cycle", "parallel"])
def test_factors_and_kernels_take_the_steps_of_their_own_gradients(schedule: Any):
    params, members = factored()
    images = jax.random.normal(jax.random.key(3), [NUM_MEMBERS, 4, 4, 4, 2])

    def loss(params: Any, images: jax.Array, factors: Any = None) -> jax.Array:
        outputs: Any = Factored().apply({"params": params}, images, factors)
        return jnp.sum(outputs**2)

    tx: Any = late_phase(optax.sgd(0.1), optax.sgd(0.2), NUM_MEMBERS, schedule=schedule)
    state: Any = tx.init(members)
    trained: Any = members
    update, differentiate = jax.jit(tx.update), jax.jit(jax.grad(loss))
    gradients = [differentiate(select_member(members, k), images[k]) for k in range(NUM_MEMBERS)]
    for gradient in gradients if schedule == "cycle" else [jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)]:
        updates, state = update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 2)))
    total = jax.tree.map(jnp.zeros_like, params)
    for k in range(NUM_MEMBERS):
        factors = member_of(members, k)
        of_params, of_factors = differentiate(params, images[k], factors)
        total = optax.tree.add(total, of_params)
        moved = jax.tree.map(lambda factor, slope: factor - 0.2 * slope, factors, of_factors)
        assert_trees_close(member_of(trained, k), moved)
    assert_trees_close(trained.base, optax.tree.add_scale(params, -0.1, total))


def test_factors_are_along_the_axes_of_equinox():
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    members = split_members(layer, rank_one_mask, jax.random.key(1), 0.5, num_members=2)
    inputs, outputs = members.members.weight
    x = jax.random.normal(jax.random.key(2), [3])
    expected = layer.weight @ (x * inputs[1]) * outputs[1] + layer.bias
    np.testing.assert_allclose(select_member(members, 1)(x), expected, rtol=1e-5)


def test_factors_have_new_moments_and_kernels_keep_theirs():
    """Counts of schedules go on for both; those that correct moments are moments."""
    params, members = factored()
    tx = functools.partial(optax.adam, optax.constant_schedule(0.1))
    _, plain = tx().update(params, tx().init(params), params)
    late: Any = late_phase(tx(), tx(), NUM_MEMBERS)
    state, fresh = migrate_state(plain, late, members), late.init(members)
    assert_trees_equal(state.base, plain)
    assert_trees_equal(state.members[0], fresh.members[0])
    np.testing.assert_array_equal(state.members[1].count, 1)
