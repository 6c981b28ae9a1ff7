"""WNN+ against its equations and against the published code; `test_networks` has what it shares with others."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import wnn_jax
from tests import reference
from tests.helpers import assert_close, published_arrays, published_file, random_history, random_leaves
from wnn_jax._roles import ROLES
from wnn_jax.nowcasters import WNNPlus


@pytest.fixture(scope="module")
def network() -> Any:
    return random_leaves(WNNPlus.init(jax.random.key(0), width=16).params, seed=0)


@functools.partial(jax.jit, static_argnames="role")
def predict(network: Any, history: Any, role: str, horizon: Any) -> jax.Array:
    """A prediction, compiled once for all horizons."""
    return WNNPlus(network)(history, role, horizon)


def test_init_has_the_published_size():
    params = jax.eval_shape(lambda: WNNPlus.init(jax.random.key(0)).params)
    # The embedding of the published network has 15 rows of 128; ours has one for each role.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 57_384 - (15 - len(ROLES)) * 128


# Against the equations


@pytest.mark.slow_but(6)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("horizon", [1, 40])
@pytest.mark.parametrize("shape", [(3, 5, 7), ()])
def test_agrees_with_the_reference(network: Any, role: str, horizon: int, shape: tuple[int, ...]):
    history = random_history(shape)
    predicted = predict(network, history, role, horizon)
    exact = [np.asarray(snapshot, np.float64) for snapshot in history]
    assert_close(predicted, reference.wnn_plus(exact, network, ROLES.index(role), horizon))
    assert np.abs(predicted - history[-1]).max() > 0.01 * np.std(history)


# Against the published code


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return published_arrays("nino_golden.npz")


@pytest.fixture(scope="module", params=[("wnn_plus", "nino_mlp.pt"), ("wnn_plus_h32", "nino_mlp_h32.pt")])
def published(request: pytest.FixtureRequest) -> tuple[str, WNNPlus]:
    """The key of its outputs, and the network."""
    pytest.importorskip("torch")
    key, name = request.param
    return key, wnn_jax.convert.nino_mlp(published_file(name))


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("horizon", [1, 10, 40])
def test_predictions_of_the_published_code(golden: dict[str, np.ndarray], published: tuple[str, WNNPlus], horizon: int):
    key, nowcaster = published
    names = [name.removeprefix("history/") for name in golden if name.startswith("history/")]
    # In PyTorch's layout, where only ranks tell the roles apart.
    roles = {name: {1: "bias", 2: "dense", 4: "conv"}[golden[f"history/{name}"].ndim - 1] for name in names}
    assert set(roles.values()) == {"bias", "dense", "conv"}
    history = [{name: golden[f"history/{name}"][..., t] for name in names} for t in range(5)]
    predicted = jax.jit(lambda history: nowcaster(history, roles, horizon))(history)
    for name in names:
        assert_close(predicted[name], golden[f"{key}/k{horizon}/{name}"])


def test_the_reference_predicts_what_the_published_code_does(
    golden: dict[str, np.ndarray], published: tuple[str, WNNPlus]
):
    key, nowcaster = published
    for name, role in (("fc.8.weight", "dense"), ("fc.0.bias", "bias"), ("fc.0.weight", "conv")):
        history = list(np.moveaxis(golden[f"history/{name}"], -1, 0).astype(np.float64))
        predicted = reference.wnn_plus(history, nowcaster.params, ROLES.index(role), 10)
        assert_close(predicted, golden[f"{key}/k10/{name}"])
