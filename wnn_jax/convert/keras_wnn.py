"""Read the weight files of WNN that its authors published (Keras, HDF5; Jang et al., ICML 2023)."""

import os
import re
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from wnn_jax.nowcasters.wnn import WNN

# The published code creates its layers in this order, stream after stream, and Keras numbers them so.
_STREAM_LAYERS = ("expand", "squeeze", "offset", "gain", "exponent", "project")
_LAYERS = (*((stream, layer) for stream in ("values", "differences") for layer in _STREAM_LAYERS), ("output",))
_GROUP = re.compile(r"dense(?:_(\d+))?")  # Keras leaves the number out of a session's first layer.


def keras_wnn(
    conv: str | os.PathLike[str],
    dense: str | os.PathLike[str],
    bias: str | os.PathLike[str],
    *,
    published_bias: bool = False,
) -> WNN:
    """Read the three weight files of the published WNN.

    Args:
      conv: path of the `.h5` file of the network for convolution kernels (published as `NWNN_Conv_13.h5`).
      dense: path of the `.h5` file for dense kernels (`NWNN_FC_13.h5`).
      bias: path of the `.h5` file for biases (`NWNN_Bias_13.h5`).
      published_bias: see `WNN.published_bias`.

    Returns:
      A `WNN` that predicts what the published TensorFlow code does, to 1e-5 relative in fp32.

    Raises:
      ImportError: if h5py, of the `convert` extra, is not installed.
      FileNotFoundError: if a file does not exist.
      ValueError: if a file is not such a weight file.
    """
    files = {"conv": conv, "dense": dense, "bias": bias}
    networks = {role: _read_network(role, path) for role, path in files.items()}
    record = {"source": "the published weights of Jang et al., ICML 2023"}
    return WNN(networks, published_bias=published_bias, record=record)


def _read_network(argument: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("keras_wnn needs h5py; install it with: pip install 'wnn-jax[convert]'") from error
    described = f"{argument}={os.fspath(path)!r}"
    try:
        with h5py.File(path, "r") as file:
            network = _layers(file, described)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{described} does not exist; give the path of a published .h5 file.") from error
    except OSError as error:
        raise ValueError(f"{described} is not an HDF5 file, or a damaged one ({error}).") from error
    try:
        WNN({argument: network})
    except ValueError as error:
        raise ValueError(f"{described} is not a weight file of the published WNN: {error}") from error
    return network


def _layers(file: Any, described: str) -> dict[str, Any]:
    """Read the dense layers of an HDF5 file, stored as `dense_N/dense_N/{kernel,bias}:0`, in the order of N."""
    numbers = {int(match[1] or 0): match[0] for match in map(_GROUP.fullmatch, file) if match}
    if len(numbers) != len(_LAYERS):
        raise ValueError(
            f"{described} has {len(numbers)} dense layers where the published WNN has {len(_LAYERS)}; give one of the "
            "authors' three .h5 files."
        )
    network: dict[tuple[str, ...], Any] = {}
    for (_, group), layer in zip(sorted(numbers.items()), _LAYERS, strict=True):
        for array in ("kernel", "bias"):
            dataset = file.get(f"{group}/{group}/{array}:0")
            if dataset is None:
                raise ValueError(f"{described} has no {array} in its layer {group}; is it a file of Keras weights?")
            network[*layer, array] = jnp.asarray(np.asarray(dataset))
    return flax.traverse_util.unflatten_dict(network)
