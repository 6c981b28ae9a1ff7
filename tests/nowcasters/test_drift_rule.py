"""The rules that move along a drift, against plain NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import wnn_jax
from tests import reference
from tests.helpers import assert_close, assert_trees_equal, ones_like, random_leaves, train
from wnn_jax._orthogonal import COEFFICIENTS
from wnn_jax.nowcasters import Drift

SHAPES: dict[str, Any] = {
    "Conv_0": {"kernel": (3, 2, 1, 4), "bias": (4,)},
    "Dense_0": {"kernel": (5, 3), "bias": (3,)},
    "Dense_1": {"kernel": (3, 7)},
    "Embed_0": {"embedding": (6, 3)},
    "LayerNorm_0": {"scale": (3,)},
}
TEMPLATE = jax.tree.map(np.zeros, SHAPES, is_leaf=lambda node: isinstance(node, tuple))
PARAMS, TARGET, CURVATURE = (random_leaves(TEMPLATE, seed) for seed in range(3))
ROLES = wnn_jax.default_roles(PARAMS)
NUM_STEPS, LEARNING_RATE = 100, 0.02
FAR = 1e9  # No bound.


def leaf_gradient(weights: Any, target: Any, curvature: Any) -> Any:
    """Of a quadratic along the axes, with curvatures between about 0.4 and 2.5."""
    return (weights - target) * 2.7 ** (3 * curvature)


def gradient(params: Any) -> Any:
    return jax.tree.map(leaf_gradient, params, TARGET, CURVATURE)


def motion(mean: Any, step: int, snapshot_every: int = 10) -> wnn_jax.Motion:
    return wnn_jax.Motion((mean,), mean, mean, jnp.int32(step), snapshot_every, None)


def is_matrix(role: str, leaf: Any) -> bool:
    return role in ("conv", "dense") and leaf.ndim > 1


def as_matrix(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])


# Against NumPy, on a quadratic.


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("snapshot_every", [3, 10])
@pytest.mark.parametrize(
    ("rule", "rtol"),
    [(Drift(spectral=False), 3e-5), (Drift(), 1e-3), (Drift(spectral=False, reach=0.05, gain=1.0), 3e-5)],
    ids=["slow", "spectral", "bounded"],
)
def test_a_training_is_that_of_the_equations(rule: Drift, rtol: float, snapshot_every: int):
    tx = optax.chain(optax.sgd(LEARNING_RATE), wnn_jax.nowcast(rule, snapshot_every=snapshot_every))
    steps = train(tx, PARAMS, NUM_STEPS, gradient=gradient)
    assert steps[-1].state[1].num_nowcasts == NUM_STEPS // snapshot_every - 1

    roles = jax.tree.leaves(ROLES)
    start, targets, curvatures = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (PARAMS, TARGET, CURVATURE)
    )

    def direction(role: str, mean: np.ndarray) -> np.ndarray:
        if not rule.spectral or not is_matrix(role, mean):
            return mean
        return reference.orthogonalize(as_matrix(mean), COEFFICIENTS).reshape(mean.shape)

    def expect(**changes: float) -> list[list[np.ndarray]]:
        settings = {name: getattr(rule, name) for name in ("memory", "gain", "max_gain", "reach")} | changes
        return reference.drift(
            start,
            lambda weights: list(map(leaf_gradient, weights, targets, curvatures)),
            NUM_STEPS,
            learning_rate=LEARNING_RATE,
            snapshot_every=snapshot_every,
            directions=[functools.partial(direction, role) for role in roles],
            **settings,
        )

    drifted, plain = expect(), expect(gain=0.0)
    for index, leaves in enumerate(zip(*(jax.tree.leaves(step.params) for step in steps), strict=True)):
        # What the drift does, not where the weights are, is the measure of the error.
        without = np.stack([leaves[index] for leaves in plain])
        assert_close(np.stack(leaves) - without, np.stack([leaves[index] for leaves in drifted]) - without, rtol=rtol)


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.2])
def test_the_mean_of_a_steady_motion_is_that_motion_whatever_the_gain(gain: float):
    tx = wnn_jax.nowcast(Drift(spectral=False, memory=0.1, gain=gain, max_gain=6.0, reach=FAR), snapshot_every=3)
    steps = train(tx, {"w": jnp.zeros(2)}, 600, gradient=ones_like)
    assert_close(steps[-1].state.history.means[0]["w"], np.full(2, 3.0), rtol=1e-4)
    # At the last visit, 597 steps after the first.
    memory = 0.1 * 597 + 11 + 3
    assert_close(steps[-1].updates["w"], np.full(2, 1 + min(gain * memory, 6.0) * 3), rtol=1e-4)


# The rule itself.


@pytest.mark.parametrize(("step", "snapshot_every", "expected"), [(0, 10, 21.0), (10, 10, 22.0), (9000, 3, 914.0)])
def test_the_memory_is_a_tenth_of_the_steps_and_a_little(step: int, snapshot_every: int, expected: float):
    (memory,) = Drift(memory=0.1).memories(jnp.int32(step), snapshot_every)
    assert memory == expected


@pytest.mark.parametrize(
    ("settings", "step", "gain"),
    [
        ({"gain": 0.03, "max_gain": 6.0}, 90, 0.03 * 30),
        ({"gain": 0.03, "max_gain": 0.5}, 90, 0.5),
        ({"gain": 0.03, "max_gain": 6.0}, 10**6, 6.0),
        ({"gain": 0.03, "max_gain": 6.0, "memory": 0.5}, 90, 0.03 * 66),
    ],
)
def test_the_gain_grows_with_the_memory_up_to_its_greatest(settings: Any, step: int, gain: float):
    rule = Drift(spectral=False, **{"memory": 0.1, "reach": FAR} | settings)
    for moved, mean in zip(*map(jax.tree.leaves, (rule(motion(PARAMS, step), ROLES), PARAMS)), strict=True):
        assert_close(moved, gain * np.asarray(mean))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_jumps_of_one_memory_go_no_further_than_a_share_of_the_weights(scale: float):
    rule = Drift(spectral=False, memory=0.1, gain=1.0, max_gain=FAR, reach=0.2)
    means = jax.tree.map(lambda leaf: scale * leaf, TARGET)
    params = jax.tree.map(lambda leaf: 3 * scale * leaf, PARAMS)
    moved = rule(motion(means, 90)._replace(params=params), ROLES)
    # Of 30 steps, with a visit at every tenth.
    lengths = [optax.tree.norm(jax.tree.map(lambda leaf: leaf / scale, tree)) for tree in (moved, params)]
    np.testing.assert_allclose(3 * lengths[0], 0.2 * lengths[1], rtol=1e-5)


def test_what_does_not_move_says_nothing_about_how_far_to_go():
    rule = Drift(spectral=False, memory=0.1, gain=1.0, max_gain=FAR, reach=0.2)
    roles = {"w": "bias", "mask": "bias"}
    means, params = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}
    alone = rule(motion(means, 90)._replace(params=params), {"w": "bias"})
    beside = motion(means | {"mask": jnp.zeros(2)}, 90)._replace(params=params | {"mask": jnp.full(2, -1e30)})
    np.testing.assert_array_equal(rule(beside, roles)["w"], alone["w"])


def test_a_matrix_goes_as_far_as_before_in_all_directions_alike():
    slow, spectral = (Drift(spectral=spectral)(motion(PARAMS, 100), ROLES) for spectral in (False, True))

    def check(role: str, slow: Any, spectral: Any) -> None:
        if not is_matrix(role, slow):
            assert_trees_equal(spectral, slow)
            return
        np.testing.assert_allclose(np.linalg.norm(as_matrix(spectral)), np.linalg.norm(as_matrix(slow)), rtol=1e-5)
        rotation = scipy.linalg.polar(as_matrix(slow))[0].T @ as_matrix(spectral)
        # As with the polar factor itself, but for how alike the default coefficients make the singular values.
        np.testing.assert_allclose(rotation, rotation.T, atol=1e-5 * np.abs(rotation).max())
        values = np.linalg.svd(as_matrix(spectral), compute_uv=False)
        assert 0.6 < values.min() / values.max() <= 1

    jax.tree.map(check, ROLES, slow, spectral)
    assert sum(map(is_matrix, jax.tree.leaves(ROLES), jax.tree.leaves(PARAMS))) == 3


def test_what_does_not_move_stays():
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_trees_equal(Drift()(motion(still, 100), ROLES), still)
    steps = train(wnn_jax.nowcast(snapshot_every=1), PARAMS, 4, gradient=lambda _: still)
    assert_trees_equal(steps[-1].params, PARAMS)
    assert steps[-1].state.num_nowcasts == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spectral", 1),
        ("memory", 0.0),
        ("gain", -0.1),
        ("max_gain", float("nan")),
        ("reach", 0.0),
        ("snapshot_every", 0),
        ("snapshot_every", None),
        ("max_rows", 0),
    ],
)
def test_settings_out_of_their_range_are_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be "):
        Drift(**{name: value})
