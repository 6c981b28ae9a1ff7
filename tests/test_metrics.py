from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import ones_like, train

PARAMS = {"encoder": jnp.array([1.0, 2.0]), "decoder": jnp.array([3.0])}
NAMES = {
    "num_nowcasts",
    "num_rejected",
    "num_cut",
    "num_restarts",
    "num_misplaced",
    "steps_since_nowcast",
    "last_size",
}


def chain(**options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.clip(10.0), wnn_jax.nowcast("linear", snapshot_every=1, **options))


def test_metrics_are_those_of_the_jumps():
    steps = train(chain(), PARAMS, 12, gradient=ones_like)
    found = [jax.tree.map(float, wnn_jax.metrics(step.state)) for step in steps]
    assert set(found[0]) == NAMES
    assert [values["num_nowcasts"] for values in found] == [0] * 4 + [1] * 5 + [2] * 3
    assert [values["steps_since_nowcast"] for values in found] == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    # At step 5 the parameters are [6, 7, 8], and all move on by 5.
    size = np.linalg.norm([5, 5, 5]) / np.linalg.norm([6, 7, 8])
    sizes = [values["last_size"] for values in found]
    np.testing.assert_allclose(sizes, np.repeat([0.0, float(size), sizes[-1]], [4, 5, 3]), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, -2.0])
@pytest.mark.parametrize("nowcaster", ["linear", "slow-drift"])
def test_the_size_of_a_jump_is_that_of_what_was_added(nowcaster: str, scale: float):
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=5, scale=scale)
    *_, last = train(tx, PARAMS, 25, gradient=ones_like)
    after = jax.tree.map(lambda param, update: param - update + 1, last.params, last.updates)
    length = {name: last.params[name] - after[name] for name in PARAMS}
    expected = optax.tree.norm(length) / optax.tree.norm(after)
    np.testing.assert_allclose(wnn_jax.metrics(last.state)["last_size"], expected, rtol=1e-5)


def test_metrics_of_several_nowcasts_have_the_places_of_their_states():
    labels = {"encoder": "fast", "decoder": "slow"}
    tx = optax.partition({"fast": chain(), "slow": chain(start=3)}, labels)
    steps = train(tx, PARAMS, 6, gradient=ones_like)
    counts = {name: int(value) for name, value in wnn_jax.metrics(steps[-1].state).items() if "num_nowcasts" in name}
    assert counts == {
        "inner_states/fast/inner_state/1/num_nowcasts": 1,
        "inner_states/slow/inner_state/1/num_nowcasts": 0,
    }
    assert len(wnn_jax.metrics(steps[-1].state)) == 2 * len(NAMES)


def test_metrics_are_made_inside_of_jit():
    tx = chain()
    traced = jax.jit(wnn_jax.metrics)(tx.init(PARAMS))
    assert {name: value.shape for name, value in traced.items()} == dict.fromkeys(NAMES, ())


def test_a_state_without_a_nowcast_is_refused():
    with pytest.raises(ValueError, match=r"opt_state of the type tuple has no state of wnn_jax.nowcast"):
        wnn_jax.metrics(optax.adam(1e-3).init(PARAMS))


@pytest.mark.parametrize(
    ("nowcaster", "scopes"), [("slow-drift", {"visit", "forecast"}), ("linear", {"record", "jump", "forecast"})]
)
def test_a_profiler_finds_named_scopes(nowcaster: str, scopes: set[str]):
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=2)
    text = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).as_text(debug_info=True)
    names = {name for line in text.splitlines() if "/nowcast/" in line for name in line.split("/")}
    assert scopes <= names
