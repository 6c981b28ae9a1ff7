"""The drift: trajectories worked by hand with a simple memory, and the rule itself compared with plain NumPy."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import wnn_jax
from tests import reference
from tests.helpers import (
    DRIFTS,
    HalfMemory,
    Step,
    assert_close,
    assert_trees_equal,
    network_params,
    ones_like,
    random_leaves,
    train,
)
from wnn_jax._orthogonal import COEFFICIENTS
from wnn_jax.nowcasters import Drift

ZERO = {"w": jnp.zeros([])}


def from_zero(length: int, nowcaster: Drift | None = None, **options: Any) -> list[Step]:
    """A run of one weight that starts at 0 and moves by 1 a step."""
    tx = wnn_jax.nowcast(HalfMemory() if nowcaster is None else nowcaster, **options)
    return train(tx, ZERO, length, gradient=ones_like)


def updates(steps: Sequence[Step]) -> list[float]:
    return [step.updates["w"].item() for step in steps]


def means(steps: Sequence[Step]) -> list[float]:
    return [step.state.history.mean["w"].item() for step in steps]


# Trajectories by hand.


def test_every_visit_but_the_first_moves_the_parameters_on():
    steps = from_zero(8)
    assert updates(steps) == [1, 1, 1, 1 + 1, 1, 1 + 1.5, 1, 1 + 1.75]
    assert [step.params["w"].item() for step in steps] == [1, 2, 3, 5, 6, 8.5, 9.5, 12.25]
    assert means(steps) == [0, 0, 0, 1, 1, 1.5, 1.5, 1.75]
    assert [step.state.history.anchor["w"].item() for step in steps] == [0, 2, 2, 5, 5, 8.5, 8.5, 12.25]
    assert [int(step.state.count) for step in steps] == list(range(1, 9))
    assert [int(step.state.num_snapshots) for step in steps] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [int(step.state.num_nowcasts) for step in steps] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert all(step.state.num_rejected == 0 for step in steps)


def test_jumps_are_no_part_of_the_displacement():
    steps = from_zero(30, HalfMemory(max_gain=6.0))
    assert means(steps) == means(from_zero(30))
    assert means(steps)[-1] == pytest.approx(2, rel=1e-3)
    assert updates(steps)[-1] == 1 + 6.0 * means(steps)[-1]


def test_the_spacing_is_the_nowcasters_own_or_another():
    assert updates(from_zero(9, HalfMemory(snapshot_every=3))) == [1, 1, 1, 1, 1, 2.5, 1, 1, 1 + 2.25]
    assert updates(from_zero(9, snapshot_every=3)) == [1, 1, 1, 1, 1, 2.5, 1, 1, 1 + 2.25]
    assert updates(from_zero(4, snapshot_every=1)) == [1, 1.5, 1.75, 1.875]


def test_the_memory_is_that_of_the_steps_since_the_first_visit():
    asked: list[tuple[int, int]] = []

    class Listener(HalfMemory):
        def memory_after(self, num_steps: Any, snapshot_every: Any) -> Any:
            jax.debug.callback(lambda steps: asked.append((int(steps), snapshot_every)), num_steps)
            return super().memory_after(num_steps, snapshot_every)

    from_zero(10, Listener(), num_steps=50, start=3)
    jax.effects_barrier()
    assert asked == [(0, 2), (2, 2), (4, 2), (6, 2)]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.5, [1.5, 1.75, 1.875]),
        (np.float32(-1.0), [0, -0.5, -0.75]),
        (optax.linear_schedule(2.0, 0.0, 2), [3, 2.5, 1]),
    ],
)
def test_scale_says_how_far_to_go(scale: Any, expected: list[float]):
    steps = from_zero(8, scale=scale)
    assert [updates(steps)[t] for t in (3, 5, 7)] == expected
    assert steps[-1].state.num_nowcasts == 3


# Jumps that are not finite.


def test_a_history_that_is_not_finite_is_rejected_and_another_begins():
    tx = wnn_jax.nowcast(HalfMemory())
    *_, good = from_zero(4)
    broken = train(tx, {"w": jnp.nan}, 2, gradient=ones_like, state=good.state)
    assert updates(broken) == [1, 1]
    assert [int(step.state.num_rejected) for step in broken] == [0, 1]
    assert [int(step.state.num_snapshots) for step in broken] == [2, 0]
    mended = train(tx, {"w": jnp.array(100.0)}, 6, gradient=ones_like, state=broken[-1].state)
    # As from the beginning.
    assert updates(mended) == [1, 1, 1, 1 + 1, 1, 1 + 1.5]
    assert means(mended)[1:] == [0, 0, 1, 1, 1.5]
    assert (mended[-1].state.num_nowcasts, mended[-1].state.num_rejected) == (3, 1)


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_jump_with_one_bad_element_is_not_made_anywhere(value: float):
    def gradient(params: Any) -> Any:
        """Steps of one, but for one element in which the sixth step ends."""
        return params | {
            "w": jnp.ones(3),
            "b": jnp.ones((2, 2)).at[-1, -1].set(jnp.where(params["w"][0] == 6, value, 1)),
        }

    steps = train(wnn_jax.nowcast(HalfMemory()), {"w": jnp.zeros(3), "b": jnp.zeros((2, 2))}, 6, gradient=gradient)
    assert [step.updates["w"].tolist() for step in steps[3:]] == [[2] * 3, [1] * 3, [1] * 3]
    assert steps[5].updates["b"].ravel().tolist()[:3] == [1] * 3
    assert [int(step.state.num_rejected) for step in steps] == [0] * 5 + [1]


@pytest.mark.parametrize(
    ("start", "gain", "scale"),
    # 32 * 99 is finite, and 64096 + 32 * 99 is not.
    [(0.0, 1.0, 1e5), (64000.0, 99.0, 1.0), (0.0, 1.0, lambda index: jnp.nan)],
    ids=["long", "far", "scale"],
)
def test_a_jump_that_leaves_the_dtype_is_not_made(start: float, gain: float, scale: Any):
    gradient = functools.partial(jax.tree.map, lambda leaf: 0 * leaf + 32)
    tx = wnn_jax.nowcast(HalfMemory(max_gain=gain), scale=scale)
    steps = train(tx, {"w": jnp.full(3, start, jnp.float16)}, 4, gradient=gradient)
    assert all((step.updates["w"] == 32).all() for step in steps)
    assert (steps[-1].state.num_nowcasts, steps[-1].state.num_rejected) == (0, 1)


# Restored histories.


@pytest.mark.parametrize("num_before", [3, 4])
def test_with_the_same_settings_a_restored_run_goes_on(num_before: int):
    undisturbed = from_zero(10)
    saved = undisturbed[num_before - 1]
    # Some checkpoints make plain tuples of named ones.
    state = saved.state._replace(
        **{name: tuple(getattr(saved.state, name)) for name in ("history", "landmark", "counters")}
    )
    resumed = train(wnn_jax.nowcast(HalfMemory()), saved.params, 10 - num_before, gradient=ones_like, state=state)
    assert_trees_equal(resumed, undisturbed[num_before:])


# Dtypes.


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("nowcaster", [HalfMemory(), *DRIFTS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_means_are_of_float32_at_least(nowcaster: Any, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=1))
        steps = train(tx, network_params(dtype), 3)
        for step in steps:
            for tree in (step.updates, step.params, step.state[1].history.anchor):
                assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
            expected = jnp.promote_types(dtype, jnp.float32)
            assert {leaf.dtype for leaf in jax.tree.leaves(step.state[1].history.mean)} == {expected}
        assert steps[-1].state[1].num_nowcasts == 2


def test_means_of_narrow_parameters_are_not_rounded():
    tx = wnn_jax.nowcast(HalfMemory(), scale=0.0)
    steps = train(tx, {"w": jnp.zeros([], jnp.bfloat16)}, 30, gradient=ones_like)
    assert means(steps)[1::2] == [2 - 2.0 ** (1 - n) for n in range(15)]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("update_dtype", ["bfloat16", "float32"])
def test_the_anchor_is_where_narrow_parameters_are(update_dtype: str):
    params = {"w": jnp.linspace(0.1, 3, 50, dtype=jnp.bfloat16)}
    random = jnp.asarray(np.random.default_rng(0).normal(size=50), update_dtype)
    steps = train(wnn_jax.nowcast(HalfMemory()), params, 8, gradient=lambda _: {"w": random})
    for step in steps[1::2]:
        assert step.updates["w"].dtype == jnp.dtype(update_dtype)
        assert_trees_equal(step.state.history.anchor, step.params)


# The rule, compared with NumPy on a quadratic.

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
    """The gradient of a quadratic, with curvatures between about 0.4 and 2.5."""
    return (weights - target) * 2.7 ** (3 * curvature)


def gradient(params: Any) -> Any:
    return jax.tree.map(leaf_gradient, params, TARGET, CURVATURE)


def jump(drift: Drift, mean: Any, params: Any, num_steps: int, *, roles: Any = ROLES) -> Any:
    @jax.jit  # One program takes less time than each of its operations alone.
    def jump(mean: Any, params: Any) -> Any:
        memory = drift.memory_after(jnp.int32(num_steps), 10)
        return drift.jump(mean, params, roles, memory=memory, snapshot_every=10)[0]

    return jump(mean, params)


def is_matrix(role: str, leaf: Any) -> bool:
    return role in ("conv", "dense") and leaf.ndim > 1


def as_matrix(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])


@pytest.mark.parametrize(
    ("rule", "rtol", "snapshot_every"),
    [(Drift(spectral=False), 3e-5, 10), (Drift(), 1e-3, 3), (Drift(spectral=False, reach=0.05, gain=1.0), 3e-5, 3)],
    ids=["slow", "spectral", "bounded"],
)
def test_a_training_run_is_that_of_the_equations(rule: Drift, rtol: float, snapshot_every: int):
    tx = optax.chain(optax.sgd(LEARNING_RATE), wnn_jax.nowcast(rule, snapshot_every=snapshot_every))
    steps = train(tx, PARAMS, NUM_STEPS, gradient=gradient)
    assert steps[-1].state[1].num_nowcasts == NUM_STEPS // snapshot_every - 1

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
            directions=[functools.partial(direction, role) for role in jax.tree.leaves(ROLES)],
            **settings,
        )

    drifted, plain = expect(), expect(gain=0.0)
    for index, leaves in enumerate(zip(*(jax.tree.leaves(step.params) for step in steps), strict=True)):
        # The error is relative to what the drift does, not to where the weights are.
        without = np.stack([leaves[index] for leaves in plain])
        assert_close(np.stack(leaves) - without, np.stack([leaves[index] for leaves in drifted]) - without, rtol=rtol)


@pytest.mark.parametrize("gain", [0.03, 0.2])
def test_in_steady_motion_the_mean_is_that_motion(gain: float):
    tx = wnn_jax.nowcast(Drift(spectral=False, memory=0.1, gain=gain, max_gain=6.0, reach=FAR), snapshot_every=3)
    steps = train(tx, {"w": jnp.zeros(2)}, 600, gradient=ones_like)
    assert_close(steps[-1].state.history.mean["w"], np.full(2, 3.0), rtol=1e-4)
    # At the last visit, 597 steps after the first.
    memory = 0.1 * 597 + 11 + 3
    assert_close(steps[-1].updates["w"], np.full(2, 1 + min(gain * memory, 6.0) * 3), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "num_steps", "gain"),
    [
        ({"gain": 0.03, "max_gain": 6.0}, 90, 0.03 * 30),
        ({"gain": 0.03, "max_gain": 0.5}, 90, 0.5),
        ({"gain": 0.03, "max_gain": 6.0}, 10**6, 6.0),
        ({"gain": 0.03, "max_gain": 6.0, "memory": 0.5}, 90, 0.03 * 66),
    ],
)
def test_the_gain_grows_with_the_memory_up_to_its_greatest(settings: Any, num_steps: int, gain: float):
    drift = Drift(spectral=False, **{"memory": 0.1, "reach": FAR} | settings)
    for moved, mean in zip(*map(jax.tree.leaves, (jump(drift, PARAMS, PARAMS, num_steps), PARAMS)), strict=True):
        assert_close(moved, gain * np.asarray(mean))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_jumps_of_one_memory_go_no_further_than_a_share_of_the_weights(scale: float):
    drift = Drift(spectral=False, memory=0.1, gain=1.0, max_gain=FAR, reach=0.2)
    mean = jax.tree.map(lambda leaf: scale * leaf, TARGET)
    params = jax.tree.map(lambda leaf: 3 * scale * leaf, PARAMS)
    moved = jump(drift, mean, params, 90)
    # One memory is 30 steps, with a visit at every tenth.
    lengths = [optax.tree.norm(jax.tree.map(lambda leaf: leaf / scale, tree)) for tree in (moved, params)]
    np.testing.assert_allclose(3 * lengths[0], 0.2 * lengths[1], rtol=1e-5)


def test_what_does_not_move_says_nothing_about_how_far_to_go():
    drift = Drift(spectral=False, memory=0.1, gain=1.0, max_gain=FAR, reach=0.2)
    mean, params = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}
    alone = jump(drift, mean, params, 90, roles={"w": "bias"})
    mean, params = mean | {"mask": jnp.zeros(2)}, params | {"mask": jnp.full(2, -1e30)}
    masked = jump(drift, mean, params, 90, roles={"w": "bias", "mask": "bias"})
    np.testing.assert_array_equal(masked["w"], alone["w"])


def test_a_matrix_goes_as_far_as_before_in_all_directions_alike():
    slow, spectral = (jump(Drift(spectral=spectral), PARAMS, PARAMS, 100) for spectral in (False, True))

    def check(role: str, slow: Any, spectral: Any) -> None:
        if not is_matrix(role, slow):
            assert_trees_equal(spectral, slow)
            return
        np.testing.assert_allclose(np.linalg.norm(as_matrix(spectral)), np.linalg.norm(as_matrix(slow)), rtol=1e-5)
        rotation = scipy.linalg.polar(as_matrix(slow))[0].T @ as_matrix(spectral)
        np.testing.assert_allclose(rotation, rotation.T, atol=1e-5 * np.abs(rotation).max())
        values = np.linalg.svd(as_matrix(spectral), compute_uv=False)
        assert 0.6 < values.min() / values.max() <= 1

    jax.tree.map(check, ROLES, slow, spectral)
    assert sum(map(is_matrix, jax.tree.leaves(ROLES), jax.tree.leaves(PARAMS))) == 3


def test_what_does_not_move_stays():
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    steps = train(wnn_jax.nowcast(snapshot_every=1), PARAMS, 4, gradient=lambda _: still)
    assert_trees_equal(steps[-1].params, PARAMS)
    assert steps[-1].state.num_nowcasts == 3


@pytest.mark.parametrize(
    "setting",
    [{"spectral": 1}, {"max_rows": 0}, {"snapshot_every": None}],
    ids=str,
)
def test_settings_out_of_their_range_are_refused(setting: Any):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be "):
        Drift(**setting)
