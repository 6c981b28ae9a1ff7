"""Every row of the table in `docs/guides/composition.md`: both orders, and what happens."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import wnn_jax
from tests.helpers import assert_trees_close, assert_trees_equal
from wnn_jax import averaging

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "composition.md"
ROWS = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| .+ \|(?: `(.+)`)? \|$", PAGE.read_text(), re.MULTILINE)
RIGHT = {name: right for name, right, _ in ROWS}
WRONG = {name: wrong for name, _, wrong in ROWS if wrong}
NUM_STEPS = 60
NAN_AT = 7

PARAMS = {"body": jnp.array([[2.0, 0.05], [0.04, 0.03]]), "head": jnp.array([1.0, 0.25, 0.02])}


class Run(NamedTuple):
    """A training run.

    Attributes:
      params: the parameters after every step.
      states: the state of the optimizer after every step.
    """

    params: list[Any]
    states: list[Any]


@functools.cache
def compiled(tx: Any) -> Any:
    """Return a transformation with its own compiled program, so that all rows share the one of `nowcast`."""
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update, static_argnames="grad_fn"))


def chain(*transformations: Any) -> Any:
    return optax.chain(*map(compiled, transformations))


NAMES = {
    **vars(optax),
    "averaging": averaging,
    "chain": chain,
    # Without orthogonalisation, which takes long to compile.
    "nowcast": functools.cache(functools.partial(wnn_jax.nowcast, "slow-drift")),
    "window": functools.cache(functools.partial(wnn_jax.nowcast, "linear", snapshot_every=4)),
    "mask": {"body": True, "head": False},
    "labels": {"body": "body", "head": "head"},
}


@jax.jit
def value_and_gradient(params: Any) -> tuple[jax.Array, Any]:
    """Return half the squared distance to -1, and its gradient. Every weight moves below 0."""
    gradient = gradient_fn(params, None)
    return optax.tree.norm(gradient, squared=True) / 2, gradient


def gradient_fn(params: Any, _: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 1, params)


@functools.cache
def train(code: str) -> Run:
    """Train with an optimizer as the page writes it, with one NaN gradient for `apply_if_finite`."""
    tx = eval(code, dict(NAMES))
    tx = tx if code.startswith("chain(") else compiled(tx)
    params: Any = optax.LookaheadParams.init_synced(PARAMS) if "lookahead" in code else PARAMS
    state, run = tx.init(params), Run([], [])
    for number in range(NUM_STEPS):
        value, gradient = value_and_gradient(getattr(params, "fast", params))
        if "apply_if_finite" in code and number == NAN_AT:
            gradient = jax.tree.map(lambda leaf: leaf * jnp.nan, gradient)
        extra_args = {"grad_fn": gradient_fn} if "sam(" in code else {"value": value}
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        run.params.append(params)
        run.states.append(state)
    return run


def counts(run: Run) -> dict[str, int]:
    return {name: int(count) for name, count in wnn_jax.metrics(run.states[-1]).items() if name.startswith("num_")}


def test_the_page_has_rows_and_names_each_in_its_code():
    assert len(ROWS) > 20
    assert len(RIGHT) == len(ROWS) == PAGE.read_text().count("\n| `")
    for name, *codes in ROWS:
        assert any(f"{name}(" in code for code in codes)


@pytest.mark.parametrize("name", RIGHT)
def test_in_the_right_order_it_jumps_and_is_never_misplaced(name: str):
    problems = counts(train(RIGHT[name]))
    assert problems.pop("num_nowcasts") >= 2
    assert not any(problems.values())


@pytest.mark.parametrize("name", WRONG)
def test_in_the_wrong_order_it_is_misplaced_and_never_jumps(name: str):
    metrics = counts(train(WRONG[name]))
    assert metrics["num_misplaced"] > 0
    assert metrics["num_nowcasts"] == 0


PLAIN, DEFAULT = "chain(adam(1e-2))", "chain(adam(1e-2), nowcast())"


@pytest.mark.parametrize("name", ["scale_by_schedule", "contrib.reduce_on_plateau"])
def test_jumps_shrink_with_the_steps(name: str):
    size, default_size = (wnn_jax.metrics(train(code).states[-1])["last_size"] for code in (RIGHT[name], DEFAULT))
    assert 0 < size < 0.8 * default_size


def test_an_average_of_parameters_changes_nothing():
    assert_trees_equal(train(RIGHT["averaging.ema"]).params, train(DEFAULT).params)


def test_a_step_with_a_nan_is_not_made_and_not_counted():
    run = train(RIGHT["apply_if_finite"])
    assert_trees_equal(run.params[NAN_AT], run.params[NAN_AT - 1])
    assert_trees_close(run.params[-1], train(DEFAULT).params[-2])
    assert run.states[-1].inner_state[1].count == NUM_STEPS - 1


@pytest.mark.parametrize(("name", "plain"), [("masked", PLAIN), ("partition", "chain(sgd(1e-2))")])
def test_the_rest_trains_as_without_a_nowcast(name: str, plain: str):
    last = train(RIGHT[name]).params[-1]
    assert_trees_close(last["head"], train(plain).params[-1]["head"])
    assert not jnp.allclose(last["body"], train(PLAIN).params[-1]["body"])


@pytest.mark.parametrize("name", ["freeze", "selective_transform"])
def test_frozen_parameters_do_not_move_and_may_have_a_history(name: str):
    run = train(RIGHT[name])
    assert_trees_equal(run.params[-1]["body"], PARAMS["body"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(optax.tree.get(run.states[-1], "history"))}
    assert (PARAMS["body"].shape in shapes) == (name == "freeze")


def test_steps_keep_to_a_constraint_and_jumps_do_not():
    steps = train(RIGHT["keep_params_nonnegative"]).params
    below = {number for number, params in enumerate(steps) if min(jax.tree.map(jnp.min, jax.tree.leaves(params))) < 0}
    assert below
    assert below <= {19, 29, 39, 49, 59}


def test_fast_and_slow_parameters_of_lookahead_jump_alike():
    synchronised = train(RIGHT["lookahead"]).params[-1]
    assert_trees_close(synchronised.fast, synchronised.slow)
    assert not jnp.allclose(synchronised.slow["body"], train("lookahead(adam(1e-2), 5, 0.5)").params[-1].slow["body"])


def test_the_average_of_schedule_free_jumps_and_its_sequence_does_not():
    run = train(RIGHT["contrib.schedule_free_adamw"])
    (params, jumped), (before, after) = run.params[-2:], run.states[-2:]
    schedule_free = compiled(optax.contrib.schedule_free_adamw(1e-2))
    updates, without = schedule_free.update(gradient_fn(params, None), before[0], params)
    stayed = optax.apply_updates(params, updates)
    assert_trees_close(after[0].z, without.z)
    jump = optax.tree.sub(jumped, stayed)
    assert optax.tree.norm(jump) > 0.01
    averages = [optax.contrib.schedule_free_eval_params(after[0], tree) for tree in (jumped, stayed)]
    assert_trees_close(optax.tree.sub(*averages), optax.tree.scale(1 / 0.9, jump))


def test_prodigy_estimates_another_learning_rate():
    rates = [train(code).states[-1][0].estim_lr for code in ("chain(contrib.prodigy())", RIGHT["contrib.prodigy"])]
    assert abs(rates[1] - rates[0]) > 0.01 * rates[0]


def test_the_first_of_two_nowcasts_starts_again_at_the_jumps_of_the_second():
    drift, window = map(wnn_jax.metrics, train("chain(adam(1e-2), nowcast(), window())").states[-1][1:])
    # The last jump of the window is in the last step.
    assert (window["num_nowcasts"], window["num_misplaced"]) == (NUM_STEPS // 20, 0)
    assert drift["num_misplaced"] == drift["num_restarts"] == NUM_STEPS // 20 - 1
    window, drift = map(wnn_jax.metrics, train("chain(adam(1e-2), window(), nowcast())").states[-1][1:])
    assert (drift["num_nowcasts"], drift["num_misplaced"]) == (NUM_STEPS // 10 - 1, 0)
    assert window["num_misplaced"] >= 3
    assert window["num_nowcasts"] < NUM_STEPS // 20
