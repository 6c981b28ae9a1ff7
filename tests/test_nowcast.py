from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import (
    WINDOWS,
    Step,
    assert_trees_close,
    assert_trees_equal,
    bits,
    last_plus_one,
    network_params,
    num_jumps,
    ones_like,
    train,
)

JUMP = 2.0  # of `last_plus_one`, where the ordinary update is 1: from w - 1, past w, to w + 1


def from_zero(num_steps: int, nowcaster: wnn_jax.Nowcaster | None = None, **kwargs: Any) -> list[Step]:
    """An eager run of one weight that starts at 0 and moves by 1 a step. All its values are exact."""
    tx = wnn_jax.nowcast(last_plus_one() if nowcaster is None else nowcaster, **kwargs)
    with jax.disable_jit():
        return train(tx, {"w": jnp.zeros([])}, num_steps, gradient=ones_like)


def values(trees: Sequence[Any]) -> list[float]:
    return [tree["w"].item() for tree in trees]


def jumps(steps: Sequence[Step]) -> dict[int, float]:
    """Step -> update, of the steps with another update than the ordinary one."""
    return {t: step.updates["w"].item() for t, step in enumerate(steps) if step.updates["w"] != 1}


# The trajectory, by hand.


def test_the_trajectory_by_hand():
    steps = from_zero(20, snapshot_every=2)
    assert jumps(steps) == {9: JUMP, 19: JUMP}
    assert values([step.params for step in steps]) == [*range(1, 10), *range(11, 21), 22]
    assert [int(step.state.count) for step in steps] == list(range(1, 21))
    assert [int(step.state.num_nowcasts) for step in steps] == [0] * 9 + [1] * 10 + [2]
    assert all(step.state.num_rejected == 0 for step in steps)
    # The jumps are at 9, from 9 to 11, and at 19.
    empty, first = [[0, 0, 0, 0], [2, 0, 0, 0], [2, 4, 0, 0], [2, 4, 6, 0]], [2, 4, 6, 8]
    second = [[13, 4, 6, 8], [13, 15, 6, 8], [13, 15, 17, 8], [13, 15, 17, 19], [13, 15, 17, 19]]
    snapshots = [values(step.state.history.snapshots) for step in steps]
    assert snapshots[0] == empty[0]
    assert snapshots[1::2] == [*empty[1:], first, first, *second]
    tx = wnn_jax.nowcast(last_plus_one(), snapshot_every=2)
    assert_trees_equal(train(tx, {"w": jnp.zeros([])}, 20, gradient=ones_like), steps)


def test_the_nowcaster_sees_the_window_oldest_first():
    digits = wnn_jax.leafwise(lambda history, role, horizon: sum(s * 10.0**i for i, s in enumerate(history)))  # pyright: ignore[reportArgumentType]
    steps = from_zero(10, digits, snapshot_every=1, horizon=10**5)  # Far enough for the bound.
    # Snapshots 1 2 3 4 5 and then, from the parameters 54321, the same again.
    assert steps[4].params["w"] == 54321
    assert values(steps[-1].state.history.snapshots) == [54322, 54323, 54324, 54325]


@pytest.mark.parametrize(
    ("context", "expected"),
    [(1, [1, 3, 4, 6, 7, 9]), (2, [1, 2, 3, 5, 6, 7]), (3, [1, 2, 3, 4, 5, 7])],
)
def test_windows_of_another_length(context: int, expected: list[int]):
    steps = from_zero(6, last_plus_one(context), snapshot_every=2)
    assert values([step.params for step in steps]) == expected
    assert len(steps[-1].state.history.snapshots) == context - 1


@pytest.mark.parametrize(
    ("start", "stop", "jump_steps"),
    [
        (2, None, [5, 11]),
        (3, None, [8]),
        (0, 5, []),
        (3, 9, [8]),
    ],
)
def test_start_and_stop(start: int, stop: int | None, jump_steps: list[int]):
    steps = from_zero(13, last_plus_one(context=2), snapshot_every=3, start=start, stop=stop)
    assert jumps(steps) == dict.fromkeys(jump_steps, JUMP)
    first_snapshot = next((t for t, step in enumerate(steps) if values(step.state.history.snapshots) != [0]), None)
    assert first_snapshot == (start // 3 + (start % 3 > 2)) * 3 + 2


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.25, [1.25, 1.25, 1.25]),
        (-1.0, [0, 0, 0]),
        (np.float32(2.5), [3.5, 3.5, 3.5]),
        (optax.linear_schedule(2.0, 0.0, 2), [3, 2, 1]),
    ],
)
def test_scale_says_how_far_to_go_from_the_ordinary_step_to_the_forecast(scale: Any, expected: list[float]):
    steps = from_zero(12, last_plus_one(context=2), snapshot_every=2, scale=scale)
    assert [steps[t].updates["w"].item() for t in (3, 7, 11)] == expected
    assert steps[-1].state.num_nowcasts == 3


@pytest.mark.slow_but(6)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("update_dtype", ["same", "float32"])
@pytest.mark.parametrize(
    ("nowcaster", "scale"),
    [(last_plus_one(1), 0.0), ("slow-drift", 0.0), ("slow-drift", lambda index: 0.0 * index)],
    ids=["window", "drift", "schedule"],
)
def test_at_scale_0_the_updates_are_the_optimizers_own_bit_for_bit(
    nowcaster: Any, scale: Any, dtype: Any, update_dtype: str
):
    random = np.random.default_rng(3)
    params = {"w": jnp.asarray(random.normal(size=(40, 50)), dtype)}
    # Zeros of both signs, and updates far below the rounding of the weights.
    sizes = random.normal(size=(40, 50)) * 10.0 ** random.uniform(-7, 1, (40, 50)) * random.integers(0, 2, (40, 50))
    own = {"w": jnp.asarray(sizes, dtype if update_dtype == "same" else update_dtype)}
    steps = train(wnn_jax.nowcast(nowcaster, snapshot_every=1, scale=scale), params, 3, gradient=lambda _: own)
    plain = train(optax.identity(), params, 3, gradient=lambda _: own)
    for step, expected in zip(steps, plain, strict=True):
        assert bits((step.updates, step.params)) == bits((expected.updates, expected.params))
    assert steps[-1].state.num_nowcasts == num_jumps(nowcaster, 3)


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (None, [5, 5, 5]),
        (3, [4, 4, 4]),
        (lambda index: 1 + 2 * index, [2, 4, 6]),
        (lambda index: jnp.array([-3, jnp.nan, jnp.inf])[index], [2, 2, 6]),
    ],
)
def test_horizon_reaches_the_nowcaster(horizon: Any, expected: list[float]):
    def fn(history: Any, role: str, horizon: Any) -> Any:
        return history[-1] + (4 if horizon is None else jnp.where(horizon == 2**24, 5, horizon))

    ahead = wnn_jax.leafwise(fn, context=2)
    steps = from_zero(12, ahead, snapshot_every=2, horizon=horizon)
    assert [steps[t].updates["w"].item() for t in (3, 7, 11)] == expected


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("nowcaster", WINDOWS, indirect=True)
@pytest.mark.parametrize("scale", [1.0, 0.3, 1.5])
def test_a_jump_starts_from_the_parameters_after_the_optimizers_step(nowcaster: str | wnn_jax.Nowcaster, scale: float):
    params = network_params()
    tx = optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=2, scale=scale))
    adam_alone = train(optax.adam(0.1), params, 10)
    steps = train(tx, params, 10)
    for step, expected in zip(steps[:9], adam_alone, strict=False):
        assert_trees_close(step.updates, expected.updates)

    predict: Any = wnn_jax.load(nowcaster) if isinstance(nowcaster, str) else nowcaster
    window = [adam_alone[t].params for t in (1, 3, 5, 7, 9)]
    prediction = jax.jit(lambda window: predict(window, wnn_jax.default_roles(params), None))(window)
    arrival = jax.tree.map(lambda new, after: after + scale * (new - after), prediction, adam_alone[9].params)
    assert_trees_close(steps[9].params, arrival)
    assert_trees_close(steps[9].updates, jax.tree.map(jnp.subtract, arrival, steps[8].params))
    # Adam goes on as if nothing had happened.
    assert_trees_close(steps[9].state[0], adam_alone[9].state)


# Histories of other settings.


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("num_before", "before", "after"),
    [
        # The next snapshot comes after as many steps as the new spacing has, or the old one.
        (11, {"snapshot_every": 10}, {"snapshot_every": 2}),
        (30, {"snapshot_every": 10}, {"snapshot_every": 1}),
        (33, {"snapshot_every": 8}, {"snapshot_every": 2}),
        (24, {"snapshot_every": 4}, {"snapshot_every": 8}),
        (9, {"snapshot_every": 2}, {"snapshot_every": 2, "start": 18}),
        (9, {"snapshot_every": 2, "stop": 6}, {"snapshot_every": 2}),
    ],
    ids=str,
)
def test_with_other_settings_a_restored_run_begins_a_window_of_its_own(num_before: int, before: Any, after: Any):
    every = after["snapshot_every"]

    def spaced(history: Any, role: str, horizon: Any) -> jax.Array:
        is_even = jnp.all(jnp.diff(jnp.stack(history)) == every)
        return jnp.where(is_even, history[-1] + 1, jnp.nan)

    old = wnn_jax.nowcast(last_plus_one(), **before)
    saved = train(old, {"w": jnp.zeros([])}, num_before, gradient=ones_like)[-1]
    num_saved = int(saved.state.num_nowcasts)
    new = wnn_jax.nowcast(wnn_jax.leafwise(spaced), **after)
    steps = train(new, saved.params, 8 * every + 10, gradient=ones_like, state=saved.state)
    assert steps[-1].state.num_rejected == 0
    first = next(t for t in range(num_before, 1000) if t % every == every - 1 and t >= after.get("start", 0))
    jump_steps = {num_before + t for t in jumps(steps)}
    assert min(jump_steps) == first + 4 * every
    assert steps[-1].state.num_nowcasts == num_saved + len(jump_steps)
    assert steps[-1].state.counters.num_restarts == (saved.state.num_snapshots > 0)


# The bound of a jump.


def far(by: float, context: int = 3) -> wnn_jax.Nowcaster:
    return wnn_jax.leafwise(lambda history, role, horizon: history[-1] + by, context=context)


@pytest.mark.parametrize(("by", "length", "num_cut"), [(9, 9, 0), (10, 10, 0), (11, 10, 1), (-1e30, -10, 1)])
def test_a_jump_is_bounded_by_the_range_in_the_window(by: float, length: float, num_cut: int):
    steps = from_zero(6, far(by), snapshot_every=1)
    # Snapshots 1, 2, 3: a range of 2, and as many times that as snapshots ahead, of which there are 5.
    assert jumps(steps) == {2: 1 + length, 5: 1 + length}
    assert [int(step.state.counters.num_cut) for step in steps] == [0, 0, num_cut, num_cut, num_cut, 2 * num_cut]
    assert steps[-1].state.num_rejected == 0


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"horizon": 1}, [2, 2]),
        ({"horizon": 7}, [14, 14]),
        ({"horizon": lambda index: 3 - 2 * index}, [6, 2]),
        ({"horizon": 2, "scale": 10.0}, [40, 40]),
    ],
    ids=["1", "7", "schedule", "scale"],
)
def test_the_bound_is_that_of_the_horizon_and_the_scale_comes_on_top(options: Any, lengths: list[float]):
    steps = from_zero(6, far(1000), snapshot_every=1, **options)
    assert jumps(steps) == dict(zip((2, 5), [1 + length for length in lengths], strict=True))


def test_a_nowcaster_says_how_far_it_forecasts():
    nowcaster: Any = far(1000)
    object.__setattr__(nowcaster, "default_horizon", 3)
    assert jumps(from_zero(3, nowcaster, snapshot_every=1)) == {2: 1 + 6}


def test_a_window_of_one_snapshot_is_bounded_by_the_last_step():
    assert jumps(from_zero(4, far(1000, context=1), snapshot_every=2)) == {1: 1 + 5, 3: 1 + 5}


@pytest.mark.parametrize("nowcaster", [far(1000), "exponential"], ids=str)
def test_weights_that_did_not_move_stay_whatever_they_are(nowcaster: Any):
    params = {"mask": jnp.array([-1e30, -jnp.inf, jnp.inf, 0.1]), "w": jnp.zeros(2)}
    gradient = {"mask": jnp.zeros(4), "w": jnp.array([1.0, -1.0])}
    steps = train(wnn_jax.nowcast(nowcaster, snapshot_every=1), params, 5, gradient=lambda _: gradient)
    np.testing.assert_array_equal(steps[-1].params["mask"], params["mask"])
    assert (steps[-1].state.num_nowcasts, steps[-1].state.num_rejected) == (1, 0)
    assert (steps[-1].params["w"] != gradient["w"] * 5).any()


@pytest.mark.parametrize("nowcaster", ["linear", "slow-drift"])
@pytest.mark.parametrize(("dtype", "update"), [(jnp.bfloat16, 1.5), (jnp.float16, 0.2)])
def test_weights_that_rounding_keeps_in_place_do_not_jump(nowcaster: str, dtype: Any, update: float):
    params = {"w": jnp.full(4, 1000, dtype)}
    gradient = {"w": jnp.full(4, update, dtype)}
    steps = train(wnn_jax.nowcast(nowcaster, snapshot_every=1), params, 6, gradient=lambda _: gradient)
    assert steps[-1].state.num_nowcasts > 0
    assert (steps[-1].params["w"] == 1000).all()


def test_what_is_cut_is_counted_up_to_the_largest_int():
    tx = wnn_jax.nowcast(far(1000), snapshot_every=1)
    state: Any = tx.init({"w": jnp.zeros(3)})
    state = state._replace(counters=state.counters._replace(num_cut=jnp.array(2**31 - 3)))
    steps = train(tx, {"w": jnp.zeros(3)}, 3, gradient=ones_like, state=state)
    assert steps[-1].state.counters.num_cut == 2**31 - 1


# Forecasts that are no good.


def one_bad_element(value: float, bad_horizon: int) -> wnn_jax.Nowcaster:
    """`last_plus_one`, except for the last element of a matrix, which is `value` at `bad_horizon`."""

    def fn(history: Any, role: str, horizon: Any) -> jax.Array:
        good = history[-1] + 1
        return jnp.where(horizon == bad_horizon, good.at[-1, -1].set(value), good) if good.ndim == 2 else good

    return wnn_jax.leafwise(fn, context=2)


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_forecast_with_one_bad_element_is_not_applied_anywhere(value: float):
    nowcaster = one_bad_element(value, bad_horizon=2)
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=2, horizon=lambda index: 1 + index)
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    steps = train(tx, params, 12, gradient=ones_like)

    updates = {3: JUMP, 11: JUMP}
    for t, step in enumerate(steps):
        assert_trees_equal(step.updates, jax.tree.map(lambda p, t=t: jnp.full_like(p, updates.get(t, 1.0)), params))
    assert [int(step.state.num_nowcasts) for step in steps] == [0] * 3 + [1] * 8 + [2]
    assert [int(step.state.num_rejected) for step in steps] == [0] * 7 + [1] * 5
    # The window after the rejected forecast begins with its first snapshot, as after any other: 0 + 10 + 1 jump.
    assert (steps[9].state.history.snapshots[0]["a"] == 11).all()


@pytest.mark.parametrize(
    ("start", "forecast", "scale"),
    [
        # -60000 is finite, and -60000 - 59968 is not.
        (59968.0, lambda last: -last, 1.0),
        # 7532 is finite, and 60000 + 7532 is not.
        (60000.0, lambda last: last + 5000, 1.5),
        (1.0, lambda last: last + 1, lambda index: jnp.nan),
        (1.0, lambda last: last * jnp.nan, 0.0),
    ],
    ids=["long", "far", "scale", "scale 0"],
)
def test_a_jump_that_is_not_finite_is_not_applied(start: float, forecast: Callable[[Any], Any], scale: Any):
    nowcaster = wnn_jax.leafwise(lambda history, role, horizon: forecast(history[-1]), context=1)
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=1, horizon=10**4, scale=scale)
    params = {"w": jnp.full(3, start, jnp.float16)}
    (step,) = train(tx, params, 1, gradient=lambda tree: jax.tree.map(lambda leaf: 0 * leaf + 32, tree))
    assert (step.updates["w"] == 32).all()
    assert (step.state.num_nowcasts, step.state.num_rejected) == (0, 1)


# The ends of what can be counted.


@pytest.mark.parametrize("nowcaster", [last_plus_one(context=2), "slow-drift"], ids=str)
def test_counting_ends_without_a_storm_of_jumps(nowcaster: Any):
    largest = 2**31 - 1
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=1)
    state = tx.init({"w": jnp.zeros([])})._replace(count=jnp.array(largest - 7))  # pyright: ignore[reportAttributeAccessIssue]
    steps = train(tx, {"w": jnp.zeros([])}, 20, gradient=ones_like, state=state)
    assert [int(step.state.count) for step in steps] == [*range(largest - 6, largest + 1), *[largest] * 13]
    assert steps[6].state.num_nowcasts == num_jumps(nowcaster, 7)
    assert all(step.state.num_nowcasts == steps[6].state.num_nowcasts for step in steps[7:])
    assert all((step.updates["w"] == 1).all() for step in steps[7:])
