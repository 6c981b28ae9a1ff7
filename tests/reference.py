"""The methods in plain NumPy, written from their equations: slow, readable, of any precision."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Layer = Mapping[str, Any]
Network = Mapping[str, Any]


def wnn(history: Sequence[np.ndarray], network: Network, *, published_bias: bool = False) -> np.ndarray:
    """Forecast every weight of a leaf with a `TwoStreamNetwork` (Jang et al., ICML 2023), from five snapshots of it.

    With `published_bias` the network's output is added to the raw last value, as in the published code for biases.
    """
    forecasts = [
        wnn_weight(np.array([snapshot[index] for snapshot in history]), network, published_bias=published_bias)
        for index in np.ndindex(history[0].shape)
    ]
    return np.array(forecasts, history[0].dtype).reshape(history[0].shape)


def wnn_weight(h: np.ndarray, network: Network, *, published_bias: bool = False) -> np.floating[Any]:
    """Forecast a single weight from its five values."""
    z = h - h[0]
    r = z.max() - z.min() + 1e-8
    x = z / (r + 1e-5) / 2
    last = h[4] if published_bias else x[4]
    return (last + wnn_network(x, network)) * (r + 1e-5) * 2 + h[0]


def wnn_network(x: np.ndarray, network: Network) -> np.floating[Any]:
    """Forecast the change of normalised values."""
    dx = x[1:] - x[:-1]
    features = np.concatenate([_stream(x, network["values"]), _stream(dx, network["differences"])])
    return np.tanh(_dense(features, network["output"]))[0]


def _stream(inputs: np.ndarray, layers: Mapping[str, Layer]) -> np.ndarray:
    a = _dense(inputs, layers["expand"])
    b = np.maximum(_dense(a, layers["squeeze"]), 0)
    t = _dense(b, layers["offset"])
    g = _dense(b, layers["gain"])
    e = _dense(b, layers["exponent"])
    c = t + g * np.exp(e * a)
    s = _dense(c, layers["project"])
    return np.where(s > 0, s, 0.3 * s)


def wnn_plus(history: Sequence[np.ndarray], network: Network, role: int, horizon: int) -> np.ndarray:
    """Forecast every weight of a leaf with a `HorizonNetwork` (WNN+ of Knyazev et al., ICLR 2025).

    `role` is the row of its role's embedding; the other arguments are those of `wnn`.
    """
    h = np.stack(history, axis=-1)
    mean, std = h.mean(), h.std(ddof=1)
    forecasts = [
        wnn_plus_outputs((h[index] - mean) / (std + 1e-6), network, role)[horizon - 1] * std + mean
        for index in np.ndindex(history[0].shape)
    ]
    return np.array(forecasts, h.dtype).reshape(history[0].shape)


def wnn_plus_outputs(x: np.ndarray, network: Network, role: int) -> np.ndarray:
    """Forecast a single weight at every horizon, from its normalised values."""
    h = _dense(x, network["expand"]) + np.asarray(network["role"]["embedding"], x.dtype)[role]
    for index in range(sum(name.startswith("hidden_") for name in network)):
        a = _dense(h, network[f"hidden_{index}"])
        h = a / (1 + np.exp(-a))
    return x[4] + _dense(h, network["output"])


def nino(
    features: np.ndarray,
    kinds: np.ndarray,
    sources: np.ndarray,
    targets: np.ndarray,
    nodes: np.ndarray,
    params: Network,
) -> np.ndarray:
    """Forecast how far the weights of every edge move, `[edges, 40, 9]` (NiNo of Knyazev et al., ICLR 2025).

    Features are `[edges, 45]`: normalised histories of the elements of a window, one after another. Kinds, sources and
    targets are `[edges]`, and the places of nodes `[nodes, 8]`.
    """
    v = _dense(nodes, params["position"])
    e = _dense(features, params["weights"]) + np.asarray(params["kind"]["embedding"], v.dtype)[kinds]
    for level in range(len(params["rounds"])):
        layers = params["rounds"][str(level)]
        gain, offset = np.split(_dense(e, layers["modulation"]), 2, axis=1)
        message = gain * _dense(np.concatenate([v[targets], v[sources]], axis=1), layers["message"]) + offset
        mean = np.stack([message[targets == node].mean(axis=0) for node in range(len(v))])
        v = _silu(_dense(_dense(np.concatenate([v, mean], axis=1), layers["node"]), layers["mix"]))
        update = layers["edge"]
        ends = _dense(v[sources], update["source"]) + _dense(v[targets], update["target"])
        e = _dense(_silu(_dense(e, update["edge"]) + ends), update["output"])
    kernel, bias = (np.asarray(params["output"][name], v.dtype) for name in ("kernel", "bias"))
    return np.tensordot(_silu(_dense(e, params["hidden"])), kernel, 1) + bias


def _silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def _dense(inputs: np.ndarray, layer: Layer) -> np.ndarray:
    kernel, bias = (np.asarray(layer[name], inputs.dtype) for name in ("kernel", "bias"))
    return inputs @ kernel + bias


def drift(
    weights: Sequence[np.ndarray],
    gradients: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]],
    num_steps: int,
    *,
    learning_rate: float,
    snapshot_every: int,
    memory: float,
    gain: float,
    max_gain: float,
    reach: float,
    directions: Sequence[Callable[[np.ndarray], np.ndarray]],
) -> list[list[np.ndarray]]:
    """Train leaves by gradient descent with a `Drift` of these settings, and return the leaves after every step.

    `directions` has a function for each leaf, from its running mean to the direction of its jumps.
    """
    weights, first, trajectory = list(weights), None, []
    anchors, means = weights, [np.zeros_like(leaf) for leaf in weights]
    for step in range(num_steps):
        descent = gradients(weights)
        weights = [leaf - learning_rate * slope for leaf, slope in zip(weights, descent, strict=True)]
        if (step + 1) % snapshot_every == 0:
            if first is None:
                first = step
            else:
                horizon = memory * (step - first) + 11 + snapshot_every
                share = snapshot_every / horizon
                moved = [leaf - anchor for leaf, anchor in zip(weights, anchors, strict=True)]
                means = [mean + share * (new - mean) for mean, new in zip(means, moved, strict=True)]
                longest = reach * _norm(weights) / _norm(means) * share
                factor = min(gain * horizon, max_gain, longest)
                weights = [
                    leaf + factor * direction(mean)
                    for leaf, direction, mean in zip(weights, directions, means, strict=True)
                ]
            anchors = weights
        trajectory.append(weights)
    return trajectory


def _norm(leaves: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def orthogonalize(matrix: np.ndarray, coefficients: Sequence[Sequence[float]]) -> np.ndarray:
    """Apply some steps of a polynomial to the singular values of a matrix, and keep its norm."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    # By a bound of the largest.
    mapped = values / np.sum(values**4) ** (1 / 4)
    for a, b, c in coefficients:
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    return left * (mapped * np.linalg.norm(values) / np.linalg.norm(mapped)) @ right


def pooled_linear(history: Sequence[np.ndarray], networks: Network, role: int, horizon: int) -> np.ndarray:
    """Forecast every weight of a leaf from the pooled histories of its row, its column and its tensor.

    `networks` are the parameters of a `PooledNetwork`; the other arguments are those of `wnn_plus`.
    """
    h = np.stack(history)
    changes = np.diff(h, axis=0)
    rms = np.sqrt(np.mean(changes**2))
    tensor = pool_features(changes, rms_to_compare=h.std(ddof=1))
    forecast = h[-1].copy()
    for index in np.ndindex(h[-1].shape):
        pools = {"row": changes[..., index[-2], :], "column": changes[..., index[-1]], "tensor": changes}
        for name, network in networks.items():
            features = tensor if name == "tensor" else pool_features(pools[name], rms_to_compare=rms)
            coefficients = _pool_outputs(features, tensor, network, role)[horizon - 1]
            forecast[index] += coefficients @ changes[(slice(None), *index)]
    return forecast


def pool_features(changes: np.ndarray, rms_to_compare: np.floating[Any]) -> np.ndarray:
    """Describe a pool of weights by its changes: four of each weight, in the first axis."""
    changes = changes.reshape(4, -1)
    rms = np.sqrt(np.mean(changes**2))
    mean = changes.mean(axis=1) / rms
    lags = (1, 2, 3)
    return np.array(
        [
            np.log(rms / rms_to_compare) / 2,
            *(np.log(np.sqrt(np.mean(change**2)) / rms) / 2 for change in changes),
            *(np.mean([np.mean(changes[t] * changes[t + lag]) for t in range(4 - lag)]) / rms**2 for lag in lags),
            np.sqrt(np.mean(mean**2)),
            *(np.mean([mean[t] * mean[t + lag] for t in range(4 - lag)]) for lag in lags),
            np.log(changes.shape[1]) / 8,
        ]
    )


def _pool_outputs(features: np.ndarray, tensor: np.ndarray, network: Network, role: int) -> np.ndarray:
    x = _dense(features, network["expand"]) + tensor @ np.asarray(network["tensor"]["kernel"], tensor.dtype)
    x = x + np.asarray(network["role"]["embedding"], x.dtype)[role]
    for index in range(sum(name.startswith("hidden_") for name in network)):
        a = _dense(x, network[f"hidden_{index}"])
        x = a / (1 + np.exp(-a))
    kernel, bias = (np.asarray(network["output"][name], x.dtype) for name in ("kernel", "bias"))
    return np.tensordot(x, kernel, axes=1) + bias
