"""`nowcast` with a drift for its history, by a rule so simple that its trajectories are exact and worked by hand."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import (
    DRIFTS,
    HalfMemory,
    Step,
    assert_trees_equal,
    bits,
    network_params,
    ones_like,
    train,
)

ZERO = {"w": jnp.zeros([])}


def from_zero(length: int, nowcaster: wnn_jax.DriftNowcaster | None = None, **options: Any) -> list[Step]:
    """A run of one weight that starts at 0 and moves by 1 a step."""
    tx = wnn_jax.nowcast(HalfMemory() if nowcaster is None else nowcaster, **options)
    return train(tx, ZERO, length, gradient=ones_like)


def updates(steps: Sequence[Step]) -> list[float]:
    return [step.updates["w"].item() for step in steps]


def means(steps: Sequence[Step]) -> list[float]:
    return [step.state.history.means[0]["w"].item() for step in steps]


# The trajectory, by hand.


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


def test_the_trajectory_without_a_compiler_is_the_same():
    with jax.disable_jit():
        steps = from_zero(8)
    assert_trees_equal(steps, from_zero(8))


@pytest.mark.parametrize("gain", [0.0, 6.0, -2.0])
def test_jumps_are_no_part_of_the_displacement(gain: float):
    steps = from_zero(30, HalfMemory(gain))
    assert means(steps) == means(from_zero(30))
    assert means(steps)[-1] == pytest.approx(2, rel=1e-3)
    assert updates(steps)[-1] == 1 + gain * means(steps)[-1]


def test_the_spacing_is_the_nowcasters_own_or_another():
    assert updates(from_zero(9, HalfMemory(snapshot_every=3))) == [1, 1, 1, 1, 1, 2.5, 1, 1, 1 + 2.25]
    assert updates(from_zero(9, snapshot_every=3)) == [1, 1, 1, 1, 1, 2.5, 1, 1, 1 + 2.25]
    assert updates(from_zero(4, snapshot_every=1)) == [1, 1.5, 1.75, 1.875]


def test_the_nowcaster_is_told_how_the_optimizer_moves_the_parameters():
    told: list[wnn_jax.Motion] = []

    class Listener(HalfMemory):
        def memories(self, step: Any, snapshot_every: Any) -> Sequence[Any]:
            told_of_memory.append((int(step), snapshot_every))
            return super().memories(step, snapshot_every)

        def __call__(self, motion: wnn_jax.Motion, roles: Any) -> Any:
            told.append(motion)
            assert roles == {"w": "norm"}
            return super().__call__(motion, roles)

    told_of_memory: list[tuple[int, int]] = []
    with jax.disable_jit():
        steps = from_zero(10, Listener(), num_steps=50, start=3, roles={"w": "norm"})
    visits = [3, 5, 7, 9]
    assert [int(motion.step) for motion in told] == [0, 2, 4, 6]
    assert told_of_memory == [(0, 2), (2, 2), (4, 2), (6, 2)]
    assert [motion.means[0]["w"].item() for motion in told] == [means(steps)[t] for t in visits]
    assert [motion.displacement["w"].item() for motion in told][1:] == [2, 2, 2]
    assert [motion.params["w"].item() for motion in told] == [steps[t - 1].params["w"].item() + 1 for t in visits]
    assert {(motion.snapshot_every, motion.num_steps) for motion in told} == {(2, 50)}


def test_each_mean_has_its_own_memory():
    class TwoMemories(HalfMemory):
        def memories(self, step: Any, snapshot_every: Any) -> Sequence[Any]:
            # The whole history so far, and the latest displacement alone.
            return (step, snapshot_every)

        def __call__(self, motion: wnn_jax.Motion, roles: Any) -> Any:
            return jax.tree.map(lambda of_all, latest: 50 * of_all + latest, *motion.means)

    # Updates of 0, 1, 2, ...: between two visits 2 + 3, 4 + 5, 6 + 7.
    faster = optax.scale_by_schedule(lambda count: count)
    steps = train(optax.chain(faster, wnn_jax.nowcast(TwoMemories(num_means=2))), ZERO, 8, gradient=ones_like)
    of_all, latest = ([step.state[1].history.means[index]["w"].item() for step in steps[1::2]] for index in range(2))
    assert latest == [0, 5, 9, 13]
    assert of_all == [0, 5, 7, 9]
    assert updates(steps) == [0, 1, 2, 3 + 255, 4, 5 + 359, 6, 7 + 463]


@pytest.mark.slow_but(4)
@pytest.mark.parametrize(
    ("start", "stop", "jump_steps"),
    [
        (0, None, [5, 8, 11, 14, 17]),
        (2, None, [5, 8, 11, 14, 17]),
        (3, None, [8, 11, 14, 17]),
        (6, None, [11, 14, 17]),
        (0, 5, []),
        (0, 6, [5]),
        (0, 14, [5, 8, 11]),
        (3, 9, [8]),
    ],
)
def test_start_and_stop(start: int, stop: int | None, jump_steps: list[int]):
    steps = from_zero(18, snapshot_every=3, start=start, stop=stop)
    assert [t for t, update in enumerate(updates(steps)) if update != 1] == jump_steps
    first_visit = next(t for t, step in enumerate(steps) if step.state.num_snapshots == 1)
    assert first_visit == jump_steps[0] - 3 if jump_steps else first_visit == 2
    assert steps[-1].state.num_nowcasts == len(jump_steps)


# Scale.


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.5, [1.5, 1.75, 1.875]),
        (0, [1, 1, 1]),
        (-1.0, [0, -0.5, -0.75]),
        (np.float32(2), [3, 4, 4.5]),
        (lambda index: 1.0 * index, [1, 1 + 1.5, 1 + 2 * 1.75]),
        (optax.linear_schedule(2.0, 0.0, 2), [3, 2.5, 1]),
    ],
)
def test_scale_says_how_far_to_go(scale: Any, expected: list[float]):
    steps = from_zero(8, scale=scale)
    assert [updates(steps)[t] for t in (3, 5, 7)] == expected
    assert steps[-1].state.num_nowcasts == 3


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("nowcaster", "scale"),
    [("drift", 0.0), ("slow-drift", 0.0), (HalfMemory(), lambda index: 0.0 * index)],
    ids=["drift", "slow-drift", "schedule"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_scale_0_the_updates_are_the_optimizers_own_bit_for_bit(nowcaster: Any, scale: Any, dtype: Any):
    random = np.random.default_rng(3)
    params = {"w": jnp.asarray(random.normal(size=(40, 50)), dtype)}
    # Zeros of both signs, and updates far below the rounding of the weights.
    size = random.normal(size=(40, 50)) * 10.0 ** random.uniform(-7, 0, (40, 50)) * random.integers(0, 2, (40, 50))
    own = {"w": jnp.asarray(size, dtype)}
    steps = train(wnn_jax.nowcast(nowcaster, snapshot_every=2, scale=scale), params, 7, gradient=lambda _: own)
    plain = train(optax.identity(), params, 7, gradient=lambda _: own)
    for step, expected in zip(steps, plain, strict=True):
        assert bits((step.updates, step.params)) == bits((expected.updates, expected.params))
    assert steps[-1].state.num_nowcasts == 2


# Jumps that are no good.


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


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_jump_with_one_bad_element_is_not_made_anywhere(value: float):
    class OneBadElement(HalfMemory):
        def __call__(self, motion: wnn_jax.Motion, roles: Any) -> Any:
            good = super().__call__(motion, roles)
            return good | {"b": good["b"].at[-1, -1].set(jnp.where(motion.step == 4, value, 0.0))}

    params = {"w": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    steps = train(wnn_jax.nowcast(OneBadElement()), params, 12, gradient=ones_like)
    for t, step in enumerate(steps):
        is_jump = t in (3, 9)
        assert (step.updates["w"] == (2 if is_jump else 1)).all()
        assert step.updates["b"].ravel().tolist() == ([2, 2, 2, 1] if is_jump else [1] * 4)
    assert [int(step.state.num_rejected) for step in steps] == [0] * 5 + [1] * 6 + [2]
    assert steps[-1].state.num_nowcasts == 2


def test_a_jump_too_long_for_the_dtype_is_not_made():
    params = {"w": jnp.zeros(3, jnp.float16)}
    steps = train(wnn_jax.nowcast(HalfMemory(), scale=1e5), params, 4, gradient=ones_like)
    assert all((step.updates["w"] == 1).all() for step in steps)
    assert (steps[-1].state.num_nowcasts, steps[-1].state.num_rejected) == (0, 1)


def test_a_jump_to_where_the_dtype_ends_is_not_made():
    params = {"w": jnp.full(3, 64000, jnp.float16)}  # 32 * 99 is finite, and 64096 + 32 * 99 is not
    gradient = functools.partial(jax.tree.map, lambda leaf: 0 * leaf + 32)
    steps = train(wnn_jax.nowcast(HalfMemory(gain=99)), params, 4, gradient=gradient)
    assert all((step.updates["w"] == 32).all() for step in steps)
    assert (steps[-1].state.num_nowcasts, steps[-1].state.num_rejected) == (0, 1)


def test_a_jump_is_bounded_by_the_means():
    steps = from_zero(8, HalfMemory(gain=1000))
    # The first mean is of 2 and nothing, and forgets one half of it at every visit.
    assert updates(steps) == [1, 1, 1, 1 + 100, 1, 1 + 150, 1, 1 + 175]
    assert [int(step.state.num_cut) for step in steps] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert steps[-1].state.num_rejected == 0


def test_a_jump_by_a_scale_that_is_not_finite_is_not_made():
    steps = from_zero(8, scale=lambda index: jnp.where(index == 0, jnp.nan, 1.0))
    assert updates(steps) == [1] * 7 + [1 + 1]
    assert (steps[-1].state.num_nowcasts, steps[-1].state.num_rejected) == (1, 1)


def test_a_nowcaster_that_returns_another_tree_is_refused():
    class Bare(HalfMemory):
        def __call__(self, motion: wnn_jax.Motion, roles: Any) -> Any:
            return motion.means[0]["w"]

    with pytest.raises(ValueError, match=r"returned the shapes \(\) for .*\{'w': \(\)\}.*a tree like the parameters"):
        from_zero(1, Bare())


# Histories of other settings.


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(
    ("num_before", "before", "after"),
    [
        (11, {"snapshot_every": 10}, {"snapshot_every": 2}),
        (33, {"snapshot_every": 8}, {"snapshot_every": 2}),
        (24, {"snapshot_every": 4}, {"snapshot_every": 8}),
        (9, {"snapshot_every": 2}, {"snapshot_every": 2, "start": 18}),
        (9, {"snapshot_every": 2, "stop": 6}, {"snapshot_every": 2}),
    ],
    ids=str,
)
def test_with_other_settings_a_restored_run_begins_anew(num_before: int, before: Any, after: Any):
    every = after["snapshot_every"]
    saved = from_zero(num_before, **before)[-1]
    tx = wnn_jax.nowcast(HalfMemory(), **after)
    resumed = train(tx, saved.params, 3 * every + 10, gradient=ones_like, state=saved.state)
    first = next(t for t in range(num_before, 1000) if t % every == every - 1 and t >= after.get("start", 0))
    jumps = {num_before + t: update - 1 for t, update in enumerate(updates(resumed)) if update != 1}
    assert list(jumps)[:2] == [first + every, first + 2 * every]
    assert list(jumps.values())[:2] == [every / 2, every * 3 / 4]
    assert resumed[-1].state.num_restarts == 1


@pytest.mark.parametrize("num_before", [3, 4])
def test_with_the_same_settings_a_restored_run_goes_on(num_before: int):
    undisturbed = from_zero(10)
    saved = undisturbed[num_before - 1]
    tx = wnn_jax.nowcast(HalfMemory())
    resumed = train(tx, saved.params, 10 - num_before, gradient=ones_like, state=saved.state)
    assert_trees_equal(resumed, undisturbed[num_before:])


# Dtypes.


@pytest.mark.slow
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
            assert {leaf.dtype for leaf in jax.tree.leaves(step.state[1].history.means)} == {expected}
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
