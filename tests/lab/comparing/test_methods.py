import functools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import ones_like, train
from tests.lab.toys import LinearRegression
from wnn_jax import averaging
from wnn_jax.lab.comparing.methods import find_methods, nowcast_method, standard_methods
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS, ademamix, muon, snoo, warmup_stable_decay
from wnn_jax.lab.training.trainer import Trainer

ADAM = BASE_OPTIMIZERS["adam"]


@pytest.fixture(autouse=True)
def _rank_promotion_as_users_have_it() -> Generator[None]:
    """Optax's Muon adds matrices to stacks of them."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow_but(5)
@pytest.mark.parametrize(
    ("name", "base"),
    [*((name, "adam") for name in sorted(standard_methods(ADAM))), ("wsd", "adamw"), ("snoo", "sgd")],
)
def test_every_method_trains(name: str, base: str) -> None:
    method = standard_methods(BASE_OPTIMIZERS[base])[name]
    trainer = Trainer(LinearRegression(noise=0.0), method, learning_rate=0.03, num_steps=60, evaluate_every=30)
    fitted = trainer.fit(0)
    before, after = (min(scores["mse"] for scores in evaluation.scores.values()) for evaluation in fitted.evaluations)
    assert after < before
    assert set(method.evaluation_weights) <= set(fitted.evaluations[-1].scores)


def test_the_rate_of_wsd_is_constant_and_then_falls_to_zero() -> None:
    schedule = warmup_stable_decay(0.5, 100)
    np.testing.assert_allclose(np.array([schedule(step) for step in (0, 50, 80)]), 0.5)
    np.testing.assert_allclose(np.array([schedule(step) for step in (85, 90, 100)]), [0.375, 0.25, 0.0], atol=1e-6)


def test_snoo_follows_its_equations() -> None:
    period, momentum, step_size = 3, 0.5, 0.8
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=[10, 4]).astype(np.float32)
    tx = optax.chain(optax.sgd(0.1), snoo(period, momentum, step_size))
    params: Any = {"w": jnp.asarray(rng.normal(size=4).astype(np.float32))}
    state = tx.init(params)
    fast = slow = np.array(params["w"])
    total = np.zeros(4)
    for step, gradient in enumerate(gradients, 1):
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        fast = fast - 0.1 * gradient
        if step % period == 0:
            move = slow - fast
            total = momentum * total + move
            slow = slow - step_size * (momentum * total + move)
            fast = slow
        np.testing.assert_allclose(params["w"], fast, rtol=1e-5)


def test_ademamix_has_a_growing_memory_and_weight() -> None:
    num_steps, alpha, rate = 20, 3, 0.1
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=num_steps)
    tx = ademamix(rate, num_steps, alpha=alpha)
    params: Any = {"w": jnp.zeros([])}
    state = tx.init(params)
    fast = slow = square = weight = 0.0
    for step, gradient in enumerate(gradients, 1):
        updates, state = tx.update({"w": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.999, 1 - 1 / (11 + 0.1 * (step - 1)))  # Optax counts from 0.
        fast = 0.9 * fast + 0.1 * gradient
        slow = decay * slow + (1 - decay) * gradient
        square = 0.999 * square + 0.001 * gradient**2
        share = alpha * min(1.0, (step - 1) / (0.3 * num_steps))
        corrected = fast / (1 - 0.9**step), np.sqrt(square / (1 - 0.999**step))
        weight -= rate * (corrected[0] + share * slow) / (corrected[1] + 1e-8)
    np.testing.assert_allclose(params["w"], weight, rtol=1e-4)


def test_weight_decay_reaches_the_methods_that_are_optimizers_themselves() -> None:
    still = functools.partial(jax.tree.map, jnp.zeros_like)
    for name in ("ademamix-3", "schedule-free", "muon"):
        plain, decayed = (
            train(standard_methods(ADAM, decay)[name].optimizer(0.1, 10), {"w": jnp.ones([])}, 5, gradient=still)
            for decay in (0.0, 0.5)
        )
        assert decayed[-1].params["w"] < plain[-1].params["w"] == 1.0


def test_muon_orthogonalises_kernels_as_matrices() -> None:
    shapes = {"conv": (3, 3, 2, 8), "query": (8, 2, 4), "out": (2, 4, 8)}
    rows = {"conv": 18, "query": 8, "out": 8}
    normal = np.random.default_rng(0).normal
    gradient: Any = {name: {"kernel": jnp.asarray(normal(size=shape))} for name, shape in shapes.items()}
    gradient |= {"query": {**gradient["query"], "bias": jnp.asarray(normal(size=(2, 4)))}}
    gradient |= {"embed": {"embedding": jnp.asarray(normal(size=(5, 8)))}}
    params = jax.tree.map(jnp.zeros_like, gradient)
    tx = muon(0.1)
    updates: Any = tx.update(gradient, tx.init(params), params)[0]
    for name in shapes:
        values = np.linalg.svd(updates[name]["kernel"].reshape(rows[name], -1), compute_uv=False)
        # What five quintic steps make of 1.
        assert 0.5 < values.min() / 0.1 <= values.max() / 0.1 < 1.5
    for left in (updates["query"]["bias"], updates["embed"]["embedding"]):
        sizes = np.abs(left)  # All alike, as in Adam's first step.
        np.testing.assert_allclose(sizes, np.full_like(sizes, sizes.max()), rtol=1e-4)


def test_a_nowcaster_can_be_behind_another_optimizer_than_the_others() -> None:
    """A nowcaster without jumps leaves the steps of the optimizer."""
    methods = find_methods(("drift@0+muon", "drift@0+sgd+wsd"), ADAM, weight_decay=0.5)
    alone = standard_methods(ADAM, 0.5)["muon"], standard_methods(BASE_OPTIMIZERS["sgd"])["wsd"]
    # Not of rank one: Muon would amplify the rounding, which differs between programs.
    start = {"dense": {"kernel": jax.random.normal(jax.random.key(0), [3, 2])}}
    for method, expected in zip(methods, alone, strict=True):
        ends = [train(each.optimizer(0.1, 30), start, 12)[-1].params["dense"]["kernel"] for each in (method, expected)]
        np.testing.assert_allclose(*ends, atol=1e-5)  # A step is 0.1 long.


def test_lookahead_is_evaluated_at_its_slow_parameters() -> None:
    method = standard_methods(BASE_OPTIMIZERS["sgd"])["lookahead"]
    fitted = Trainer(LinearRegression(), method, learning_rate=0.01, num_steps=4, evaluate_every=4).fit(0)
    initial, _ = LinearRegression().init(jax.random.key(0))
    slow, fast = fitted.state.params.slow, fitted.state.params.fast
    jax.tree.map(np.testing.assert_array_equal, slow, initial)
    assert not np.array_equal(fast["dense"]["kernel"], slow["dense"]["kernel"])


def test_lawa_averages_the_last_tenth() -> None:
    method = standard_methods(BASE_OPTIMIZERS["sgd"])["lawa"]
    steps = train(method.optimizer(0.1, 100), {"w": jnp.zeros([])}, 100)
    average = averaging.lawa_eval_params(steps[-1].state, steps[-1].params)
    expected = np.mean([steps[taken - 1].params["w"] for taken in (92, 94, 96, 98, 100)])
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "num_steps", "message"),
    [
        ("linear", 100, r"--snapshot-every 30: the method 'linear' jumps first after 5 .* 100 steps; give 3"),
        ("drift", 12, r"^snapshot_every=10 is too large for num_steps=12"),
    ],
)
def test_a_run_too_short_for_a_jump_is_refused(name: str, num_steps: int, message: str) -> None:
    (method,) = find_methods((name,), ADAM, snapshot_every=30)
    with pytest.raises(UsageError, match=message):
        method.optimizer(0.1, num_steps)


def test_methods_are_named_as_they_are_given(tmp_path: Path) -> None:
    wnn_jax.save(wnn_jax.nowcasters.WNN.init(jax.random.key(0)), tmp_path / "saved.npz")
    names = ("plain", "cosine", "linear@0.5", "linear~5", "linear@2~40-1+ema+wsd", "drift", "slow-drift@0.5+muon+wsd")
    methods = find_methods((*names, f"{tmp_path / 'saved.npz'}@0.25+cosine"), ADAM)
    assert [method.name for method in methods] == [*names, "saved@0.25+cosine"]
    assert [method.name for method in methods if method.is_baseline] == ["plain", "cosine"]


def test_the_horizon_of_a_method_goes_from_its_first_to_its_last() -> None:
    ahead = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + horizon)
    method = nowcast_method("ahead", lambda rate: optax.sgd(-rate), ahead, snapshot_every=2, horizon=(40, 1))
    steps = train(method.optimizer(1.0, 34), {"w": jnp.zeros([])}, 34, gradient=ones_like)
    updates = [step.updates["w"].item() for step in steps]
    assert [update - 1 for update in updates if update != 1] == [40, 13, 1]


def test_a_method_with_snapshots_of_a_running_mean() -> None:
    (method,) = find_methods(("linear@0.5~3+ema",), BASE_OPTIMIZERS["sgd"], snapshot_every=4)
    by_hand = optax.chain(
        optax.sgd(0.1), wnn_jax.nowcast("linear", snapshot_every=4, horizon=3, scale=0.5, average=0.75, stop=38)
    )
    own, expected = (train(tx, {"w": jnp.ones([3])}, 40) for tx in (method.optimizer(0.1, 40), by_hand))
    jax.tree.map(np.testing.assert_array_equal, own[-1].params, expected[-1].params)
    assert own[-1].state[-1].num_nowcasts == 1


def test_there_are_30_snapshots_unless_another_spacing_is_given() -> None:
    ahead = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + 1, takes_horizon=False)
    # The last snapshot is after the last step, where there is no jump.
    for every, jumps in ((None, 5), (28, 2)):
        method = nowcast_method("ahead", lambda rate: optax.sgd(0.0), ahead, snapshot_every=every)
        steps = train(method.optimizer(0.0, 300), {"w": jnp.zeros([])}, 300)
        assert steps[-1].state[-1].num_nowcasts == jumps


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"--methods \(none\) must name at least one method"),
        (("plain", "plain"), "--methods plain plain must name .* none twice"),
        (("best",), "--methods 'best' is not known. Methods: plain, cosine, wsd, ademamix-3.*Nowcasters.*wnn-plus"),
        (("missing.npz",), "no nowcaster file at 'missing.npz'"),
        (("linear@half",), r"'linear@half' cannot be used: .* float: 'half'; give NAME or NAME@0\.5"),
        (("linear@nan",), "--methods 'linear@nan' cannot be used: scale=nan must be"),
        (("linear~0",), "--methods 'linear~0' cannot be used: first=0 must be an int >= 1"),
        (("linear~far",), "'linear~far' is not known"),
        (("linear~5@0.5",), "is not known"),
        (("linear+lion",), r"'linear\+lion' is not known.*\[\+OPTIMIZER\]"),
        (("drift~5",), "--methods 'drift~5' cannot be used: horizon=5 was given, but Drift"),
        (("drift+ema",), r"--methods 'drift\+ema' cannot be used: average=True was given.*leave \+ema out"),
    ],
)
def test_bad_methods_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_methods(names, ADAM)
