"""Averages of weights that are hard on arithmetic, against averages in extended precision.

An average of finite weights is finite, lies between them, and is as exact as rounding lets it be. What is not finite is
left out and counted, or refused by name, or stays in the weight or the member that it was in.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from tests.properties.strategies import DTYPES, Tree, histories, num_examples, spoiled
from wnn_jax import averaging, late_phase

_SHAPES = {"kernel": (8, 6), "bias": (6,), "scale": (), "nothing": (0,)}
_LATE = {"kernel": False, "bias": True, "scale": True, "nothing": False}
_NUM_STEPS = 10
_NUM_MEMBERS = 3
_MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "uniform": (averaging.uniform, averaging.uniform_eval_params),
    "lawa": (averaging.lawa, averaging.lawa_eval_params),
    "ema": (averaging.ema, averaging.ema_eval_params),
}
_OPTIONS = [
    ("uniform", {"start_step": 2, "period": 3}),
    ("lawa", {"size": 2, "period": 2, "start_step": 1}),
    ("ema", {"decay": 0.5}),
    ("uniform", {}),
    ("lawa", {"size": 4}),
    ("ema", {"decay": 0.99}),
]
_SUBSPACES = [
    ("deltas", 4, "float32"),
    ("orthonormal", None, "bfloat16"),
    *itertools.product(["deltas", "orthonormal"], [None], DTYPES),
    ("deltas", 1, "float16"),
]
# How far rounding takes a sum of a few numbers, in units of the last place of the largest.
_ROUNDINGS = 64


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(("kind", "options"), _OPTIONS, ids=str)
@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data())
def test_a_running_average_is_that_of_the_steps_it_takes(kind: str, options: dict[str, Any], data: st.DataObject):
    dtype, goals = _draw_trees(data, 1 + _NUM_STEPS)
    broken = data.draw(st.one_of(st.just(set[int]()), st.sets(st.integers(0, _NUM_STEPS - 1), max_size=3)))
    goals = data.draw(spoiled(goals, broken))
    with np.errstate(all="ignore"):
        updates = [jax.tree.map(np.subtract, goal, tree) for tree, goal in itertools.pairwise(goals)]
        after = [jax.tree.map(np.add, tree, update) for tree, update in zip(goals, updates, strict=False)]
    broken = {step for step, tree in enumerate(after) if not all(np.isfinite(leaf).all() for leaf in tree.values())}
    with jax.enable_x64(dtype == "float64"):
        run = _average(kind, **options)
        state, average = jax.device_get(run(_stack(goals[:-1]), _stack(updates), after[-1]))
    start, period = options.get("start_step", 0), options.get("period", 1)
    taken = range(start + period - 1, _NUM_STEPS, period)
    kept = [step for step in taken if step not in broken][-options.get("size", _NUM_STEPS) :]
    assert state.num_rejected == len(broken & set(taken))
    if not kept:
        assert _bits(average) == _bits(after[-1])
        return
    shares = [options.get("decay", 1.0) ** (len(kept) - 1 - index) for index in range(len(kept))]
    _assert_average(average, [after[step] for step in kept], np.array(shares) / sum(shares))


@functools.cache
def _average(kind: str, **options: Any) -> Any:
    make, read = _MAKERS[kind]

    @jax.jit
    def run(params: Any, updates: Any, last: Any) -> Any:
        tx = make(**options)

        def step(state: Any, inputs: Any) -> Any:
            return tx.update(inputs[1], state, inputs[0])[1], None

        state, _ = jax.lax.scan(step, tx.init(last), (params, updates))
        return state, read(state, last)

    return run


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(("form", "bits", "dtype"), _SUBSPACES)
@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data())
def test_a_subspace_has_the_mean_and_the_last_checkpoint(form: Any, bits: Any, dtype: str, data: st.DataObject):
    trees = data.draw(histories(3, _SHAPES, dtype))
    event = data.draw(st.sampled_from(["nothing", "duplicate", "equal", "broken"]))
    trees = {"duplicate": [trees[1], *trees[1:]], "equal": [trees[0]] * 3}.get(event, trees)
    first_broken = data.draw(st.integers(0, len(trees) - 1))
    if event == "broken":
        trees = data.draw(spoiled(trees, {first_broken}))
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # About checkpoints that depend on others.
        arrays = [jax.tree.map(jnp.asarray, tree) for tree in trees]
        try:
            subspace = averaging.make_subspace(arrays, form=form, bits=bits)
        except ValueError as error:
            _assert_refused_rightly(str(error), trees, first_broken if event == "broken" else None)
            return
        assert event != "broken"
        mean, last = (averaging.init_coefficients(subspace, start) for start in ("mean", "last"))
        combine = jax.jit(averaging.combine)
        combined_mean, combined_last = jax.device_get((combine(subspace, mean), combine(subspace, last)))
    if form == "deltas":
        _assert_average(combined_mean, trees, [1 / len(trees)] * len(trees))
    if form == "deltas" and bits is None:
        _assert_average(combined_last, trees, [0] * (len(trees) - 1) + [1])
    assert all(np.isfinite(leaf).all() for tree in (combined_mean, combined_last) for leaf in tree.values())


def _assert_refused_rightly(message: str, trees: Sequence[Tree], broken: int | None) -> None:
    dtype = jnp.promote_types(trees[0]["kernel"].dtype, jnp.float32)
    largest, tiny = (float(value) for value in (jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_normal))
    if broken is not None:
        assert f"checkpoints[{broken}] has a value that is not finite" in message
    elif "too far" in message:
        assert _largest(trees) > largest / 64
    elif "all the same" in message:
        moves = [{name: leaf - trees[-1][name] for name, leaf in _exact(tree).items()} for tree in trees]
        assert _largest(moves) <= tiny
    else:
        assert "zero" in message
        assert _largest(trees[-1:]) <= tiny


@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data())
def test_a_weight_history_keeps_the_checkpoints_that_are_due(data: st.DataObject):
    dtype, trees = _draw_trees(data, _NUM_STEPS)
    trees = data.draw(spoiled(trees, data.draw(st.sets(st.integers(0, _NUM_STEPS - 1), max_size=1))))
    period, start = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    size, narrow = data.draw(st.sampled_from([None, 1, 3])), data.draw(st.sampled_from([None, *DTYPES[:3]]))
    with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        history = averaging.WeightHistory(period=period, size=size, start_step=start, dtype=narrow)
        told = [step for step, tree in enumerate(trees) if history.update(step, jax.tree.map(jnp.asarray, tree))]
        assert told == list(range(start + period - 1, _NUM_STEPS, period))
        assert history.steps == told[-(size or _NUM_STEPS) :]
        for step, checkpoint in zip(history.steps, history, strict=True):
            assert _bits(checkpoint) == _bits(
                {name: leaf.astype(narrow or dtype) for name, leaf in trees[step].items()}
            )


@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data())
def test_members_are_averaged_weight_by_weight(data: st.DataObject):
    dtype, trees = _draw_trees(data, 1 + _NUM_MEMBERS)
    (params, *members), late = trees, [name for name, is_late in _LATE.items() if is_late]
    members = [{name: tree[name] for name in late} for tree in members]
    members = data.draw(spoiled(members, data.draw(st.sets(st.integers(0, _NUM_MEMBERS - 1), max_size=1))))
    with jax.enable_x64(dtype == "float64"):
        split = late_phase.split_members(params, _LATE, jax.random.key(0), num_members=_NUM_MEMBERS)
        split = split._replace(members={**split.members, **_stack(members)})
        average, _ = jax.device_get(late_phase.average_members(split))
        for index, member in enumerate(members):
            assert _bits(late_phase.select_member(split, index)) == _bits({**params, **member})
    for name in late:
        # What is not finite stays in its weight.
        is_finite = np.isfinite([member[name] for member in members]).all(axis=0)
        assert (np.isfinite(average[name]) == is_finite).all(), name
        good = [{name: np.where(is_finite, tree[name], np.zeros_like(tree[name]))} for tree in (average, *members)]
        _assert_average(good[0], good[1:], [1 / _NUM_MEMBERS] * _NUM_MEMBERS)


@pytest.mark.parametrize("schedule", ["cycle", "parallel"])
@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data())
def test_a_broken_gradient_stays_with_its_member(schedule: Any, data: st.DataObject):
    dtype, (params, *gradients) = _draw_trees(data, 1 + _NUM_MEMBERS)
    broken = data.draw(st.integers(0, _NUM_MEMBERS - 1))
    gradients = data.draw(spoiled(gradients, {broken}))
    with jax.enable_x64(dtype == "float64"):
        split = late_phase.split_members(params, _LATE, jax.random.key(0), num_members=_NUM_MEMBERS)
        after, state = jax.device_get(_train_members(schedule)(split, _stack(gradients)))
    assert state.member == 0
    for member in set(range(_NUM_MEMBERS)) - {broken}:
        for name in (name for name, is_late in _LATE.items() if is_late):
            before, gradient = (_exact(tree)[name] for tree in (params, gradients[member]))
            expected, found = before - gradient / 10, np.asarray(after.members[name][member], np.longdouble)
            is_inside = np.abs(expected) < float(jnp.finfo(dtype).max) * 0.99
            rounding = 2 * _rounding([params[name], gradients[member][name]], dtype)
            assert (np.abs(found - expected)[is_inside] <= rounding).all(), name


@functools.cache
def _train_members(schedule: Any) -> Any:
    tx = late_phase.late_phase(optax.sgd(0.1), optax.sgd(0.1), _NUM_MEMBERS, schedule=schedule)

    @jax.jit
    def train(split: Any, gradients: Any) -> Any:
        def step(carry: Any, gradient: Any) -> Any:
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        if schedule == "parallel":
            return step((split, tx.init(split)), gradients)[0]
        return jax.lax.scan(step, (split, tx.init(split)), gradients)[0]

    return train


def _draw_trees(data: st.DataObject, number: int) -> tuple[str, list[Tree]]:
    dtype = data.draw(st.sampled_from(DTYPES))
    return dtype, data.draw(histories(number, _SHAPES, dtype))


def _assert_average(average: Tree, trees: Sequence[Tree], shares: Any) -> None:
    for name, leaf in average.items():
        parts = np.stack([_exact(tree)[name] for tree in trees])
        exact, actual = np.tensordot(np.asarray(shares, np.longdouble), parts, axes=1), _exact(average)[name]
        rounding, tiny = _rounding(parts, leaf.dtype), 2 * float(jnp.finfo(leaf.dtype).smallest_normal)
        assert np.isfinite(actual).all(), name
        assert np.abs(actual - exact).max(initial=0) <= rounding, name
        assert (actual <= parts.max(axis=0) + tiny).all(), name
        assert (actual >= parts.min(axis=0) - tiny).all(), name


def _rounding(leaves: Any, dtype: Any) -> float:
    """How far rounding may take an average of such leaves."""
    limits, wide = jnp.finfo(dtype), jnp.finfo(jnp.promote_types(dtype, jnp.float32))
    largest = max(float(np.abs(np.asarray(leaf, np.float64)).max(initial=0)) for leaf in leaves)
    tiny = float(limits.smallest_normal) + float(wide.smallest_normal)
    return largest * (float(limits.eps) + _ROUNDINGS * float(wide.eps)) + _ROUNDINGS * tiny


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _exact(tree: Any) -> Tree:
    return {name: np.asarray(leaf, np.longdouble) for name, leaf in tree.items()}


def _largest(trees: Sequence[Any]) -> float:
    return max(float(np.abs(leaf).max(initial=0)) for tree in trees for leaf in _exact(tree).values())


def _bits(tree: Any) -> dict[str, bytes]:
    """What tells weights apart, except for those below the least normal number, which devices take for 0."""
    leaves = {name: np.asarray(leaf) for name, leaf in tree.items()}
    with np.errstate(all="ignore"):
        return {
            name: np.where(np.abs(leaf) < jnp.finfo(leaf.dtype).smallest_normal, np.zeros_like(leaf), leaf).tobytes()
            for name, leaf in leaves.items()
        }
