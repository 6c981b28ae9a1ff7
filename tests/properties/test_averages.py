"""Averages of weights that are hard on arithmetic, compared with averages in extended precision.

An average of finite weights is finite, lies between them, and is as exact as rounding allows. What is not finite is
left out and counted, or refused by name.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.properties.strategies import DTYPES, Tree, histories, num_examples, spoiled, stack
from wnn_jax import averaging

_SHAPES = {"kernel": (8, 6), "bias": (6,), "scale": (), "nothing": (0,)}
_NUM_STEPS = 10
_MAKERS: dict[str, tuple[Any, Any]] = {
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
    *itertools.product(["orthonormal", "deltas"], [None], DTYPES),
]
_combine = jax.jit(averaging.combine)


@pytest.mark.slow_but(3)
@pytest.mark.parametrize(("kind", "options"), _OPTIONS, ids=str)
@hypothesis.settings(max_examples=num_examples(0.5))
@hypothesis.given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_a_running_average_is_that_of_its_steps(kind: str, options: dict[str, Any], data: st.DataObject, dtype: str):
    goals = data.draw(histories(1 + _NUM_STEPS, _SHAPES, dtype))
    goals = data.draw(spoiled(goals, data.draw(st.sets(st.integers(0, _NUM_STEPS - 1), max_size=3))))
    with np.errstate(all="ignore"):
        updates = [jax.tree.map(np.subtract, goal, tree) for tree, goal in itertools.pairwise(goals)]
        after = [jax.tree.map(np.add, tree, update) for tree, update in zip(goals, updates, strict=False)]
    with jax.enable_x64(dtype == "float64"):
        run = _average(kind, **options)
        state, average = jax.device_get(run(stack(goals[:-1]), stack(updates), after[-1]))
    start, period = options.get("start_step", 0), options.get("period", 1)
    taken = range(start + period - 1, _NUM_STEPS, period)
    good = [step for step in taken if all(np.isfinite(leaf).all() for leaf in after[step].values())]
    kept = good[-options.get("size", _NUM_STEPS) :]
    assert state.num_rejected == len(taken) - len(good)
    shares = np.array([options.get("decay", 1.0) ** (len(kept) - 1 - index) for index in range(len(kept))])
    if kept:
        _assert_average(average, [after[step] for step in kept], shares / shares.sum())
    else:
        jax.tree.map(np.testing.assert_array_equal, average, after[-1])


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
@hypothesis.given(data=st.data(), event=st.sampled_from(["nothing", "duplicate", "equal", "broken"]))
def test_a_subspace_has_the_mean_and_the_last(form: Any, bits: Any, dtype: str, data: st.DataObject, event: str):
    trees = data.draw(histories(3, _SHAPES, dtype))
    trees = {"duplicate": [trees[1], *trees[1:]], "equal": [trees[0]] * 3}.get(event, trees)
    if event == "broken":
        trees = data.draw(spoiled(trees, {1}))
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # About checkpoints that depend on others.
        try:
            subspace = averaging.make_subspace(
                [jax.tree.map(jnp.asarray, tree) for tree in trees], form=form, bits=bits
            )
        except ValueError as error:
            _assert_refused_rightly(str(error), trees, event == "broken")
            return
        starts = [averaging.init_coefficients(subspace, start) for start in ("mean", "last")]
        mean, last = (jax.device_get(_combine(subspace, start)) for start in starts)
    assert event != "broken"
    assert all(np.isfinite(leaf).all() for tree in (mean, last) for leaf in tree.values())
    if form == "deltas":
        _assert_average(mean, trees, [1 / 3] * 3)
    if form == "deltas" and bits is None:
        _assert_average(last, trees, [0, 0, 1], is_between=False)


def _assert_refused_rightly(message: str, trees: Sequence[Tree], is_broken: bool) -> None:
    limits = jnp.finfo(jnp.promote_types(trees[0]["kernel"].dtype, jnp.float32))
    if is_broken:
        assert "checkpoints[1] has a value that is not finite" in message
    elif "too far" in message:
        assert _largest(trees) > float(limits.max) / 1024
    else:
        assert "all the same" in message or "zero" in message
        origin = _exact(trees[-1]) if "all the same" in message else dict.fromkeys(_SHAPES, 0)
        moves = [{name: leaf - origin[name] for name, leaf in _exact(tree).items()} for tree in trees]
        assert _largest(moves if "all the same" in message else moves[-1:]) <= float(limits.smallest_normal)


def _assert_average(average: Tree, trees: Sequence[Tree], shares: Any, *, is_between: bool = True) -> None:
    for name, actual in _exact(average).items():
        parts, limits = np.stack([_exact(tree)[name] for tree in trees]), jnp.finfo(average[name].dtype)
        wide = jnp.finfo(jnp.promote_types(limits.dtype, jnp.float32))
        # 64 roundings of a sum of a few numbers, and one of the result.
        rounding = np.abs(parts).max(initial=0) * (float(limits.eps) + 64 * float(wide.eps))
        tiny = 64 * (float(limits.smallest_normal) + float(wide.smallest_normal))
        error = np.abs(actual - np.tensordot(np.asarray(shares, np.longdouble), parts, axes=1))
        assert (error <= rounding + tiny).all(), name
        assert not is_between or (actual <= parts.max(axis=0) + tiny).all(), name
        assert not is_between or (actual >= parts.min(axis=0) - tiny).all(), name


def _exact(tree: Any) -> Tree:
    return {name: np.asarray(leaf, np.longdouble) for name, leaf in tree.items()}


def _largest(trees: Sequence[Any]) -> float:
    return max(float(np.abs(leaf).max(initial=0)) for tree in trees for leaf in _exact(tree).values())
