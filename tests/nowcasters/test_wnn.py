import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests import reference
from tests.helpers import assert_close, published_arrays, published_file, random_history, random_leaves
from wnn_jax.nowcasters import WNN
from wnn_jax.nowcasters.wnn import TwoStreamNetwork

ROLES = ("conv", "dense", "bias")


def random_network(seed: int) -> Any:
    template = jax.eval_shape(TwoStreamNetwork().init, jax.random.key(0), jnp.zeros(5))["params"]
    return random_leaves(template, seed)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {role: random_network(seed) for seed, role in enumerate(ROLES)}


@pytest.fixture(scope="module")
def random_wnn(networks: dict[str, Any]) -> WNN:
    return WNN(networks)


@functools.partial(jax.jit, static_argnames=("role", "settings"))
def predict(networks: Any, history: Any, role: str, settings: tuple[tuple[str, Any], ...] = ()) -> jax.Array:
    """A prediction, compiled: most of these tests have many small shapes."""
    return WNN(networks, **dict(settings))(history, role, None)


# Against the equations


@pytest.mark.parametrize(
    ("role", "published_bias"), [("conv", False), ("dense", False), ("bias", False), ("dense", True), ("bias", True)]
)
def test_agrees_with_the_reference(networks: dict[str, Any], role: str, published_bias: bool):
    history = random_history((3, 5, 7))
    predicted = predict(networks, history, role, (("published_bias", published_bias),))
    expected = reference.wnn(
        [np.asarray(snapshot, np.float64) for snapshot in history],
        networks[role],
        published_bias=published_bias and role == "bias",
    )
    assert_close(predicted, expected)
    assert np.abs(predicted - history[-1]).max() > 0.1


# Against the published code


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return published_arrays("wnn_golden.npz")


@pytest.fixture(scope="module")
def published() -> WNN:
    pytest.importorskip("h5py")
    return wnn_jax.convert.keras_wnn(*(published_file(f"NWNN_{name}_13.h5") for name in ("Conv", "FC", "Bias")))


def golden_leaves(golden: dict[str, np.ndarray], *roles: str) -> list[tuple[str, str, list[np.ndarray]]]:
    """The role, name and history of every leaf."""
    keys = [key for key in golden if key.startswith(tuple(f"history/{role}/" for role in roles))]
    assert keys
    return [(key.split("/")[1], key.split("/")[2], list(np.moveaxis(golden[key], -1, 0))) for key in keys]


def sample(array: np.ndarray) -> np.ndarray:
    """Some of the weights, in double precision, for the slow reference."""
    return array.reshape(-1)[:: max(1, array.size // 50)].astype(np.float64)


@pytest.mark.parametrize("published_bias", [False, True])
def test_predictions_of_the_published_code(golden: dict[str, np.ndarray], published: WNN, published_bias: bool):
    leaves = golden_leaves(golden, *(["bias"] if published_bias else ROLES))
    assert {role for role, _, _ in leaves} == ({"bias"} if published_bias else set(ROLES))
    for role, name, history in leaves:
        expected = golden[f"wnn_bias_as_published/{name}" if published_bias else f"wnn/{role}/{name}"]
        assert_close(predict(published.params, history, role, (("published_bias", published_bias),)), expected)
        samples = [sample(snapshot) for snapshot in history]
        by_reference = reference.wnn(samples, published.params[role], published_bias=published_bias)
        assert_close(by_reference, sample(expected))


@pytest.mark.parametrize(("role", "name"), [("conv", "Conv"), ("dense", "FC"), ("bias", "Bias")])
def test_raw_outputs_of_the_published_networks(golden: dict[str, np.ndarray], published: WNN, role: str, name: str):
    inputs, expected = golden["net/input"], golden[f"net/output_{name}"]
    assert_close(TwoStreamNetwork().apply({"params": published.params[role]}, jnp.asarray(inputs)), expected)
    assert_close([reference.wnn_network(x, published.params[role]) for x in inputs.astype(np.float64)], expected)


# Leaves


def test_leaves_without_a_network_keep_their_last_value(random_wnn: WNN):
    history = random_history((4,))
    for role in ("norm", "embedding"):
        np.testing.assert_array_equal(random_wnn(history, role, None), history[-1])


def test_float64_leaves_stay_float64(networks: dict[str, Any]):
    history = [np.array([1 + 1e-9 * t]) for t in range(5)]  # a movement that float32 has no digits for
    with jax.enable_x64(True):
        predicted = np.asarray(predict(networks, history, "dense"))
    assert predicted.dtype == np.float64
    assert_close(predicted - 1, reference.wnn(history, networks["dense"]) - 1, rtol=1e-4)


# What is refused


def test_a_horizon_is_refused(random_wnn: WNN):
    with pytest.raises(ValueError, match="horizon=3 was given, but WNN takes none"):
        random_wnn(random_history((4,)), "conv", 3)  # pyright: ignore[reportArgumentType]


def test_params_of_other_roles_are_refused(networks: dict[str, Any]):
    with pytest.raises(ValueError, match="give at least one of conv, dense, bias"):
        WNN({})
    with pytest.raises(ValueError, match=r"params has the roles \['convolution'\]"):
        WNN({"convolution": networks["conv"]})


# Initialisation


def test_init_has_the_published_layers_and_spread(wnn: WNN):
    network = wnn.params["conv"]
    assert len(jax.tree.leaves(network)) == 26
    kernel = network["values"]["offset"]["kernel"]
    limit = np.sqrt(3 * 0.1 / kernel.shape[0])
    assert 0.9 * limit < np.abs(kernel).max() <= limit
