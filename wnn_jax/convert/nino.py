"""The WNN+ weight files that the authors of NiNo published (PyTorch)."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from wnn_jax._roles import ROLES
from wnn_jax.nowcasters.wnn_plus import WNNPlus

# The rows of the published embedding that are our roles.
_TYPES = {"dense": 1, "bias": 2, "conv": 3, "norm": 4, "embedding": 5}
_LAYERS = {
    "expand": "edge_proj.fc.0",
    "hidden_0": "edge_mlp.fc.0",
    "hidden_1": "edge_mlp.fc.2",
    "hidden_2": "edge_mlp.fc.4",
    "output": "edge_mlp.fc.6",
}


def nino_mlp(path: str | os.PathLike[str]) -> WNNPlus:
    """Reads a weight file of the published WNN+.

    Of the published kinds of layer it keeps those that are roles here; position embeddings become
    `embedding`, and the Q, K and V of attention `dense`.

    Args:
      path: path of the `.pt` file (published as `nino_mlp.pt` and `nino_mlp_h32.pt`).

    Returns:
      A `WNNPlus` that predicts what the published PyTorch code does, to 1e-5 relative in fp32.

    Raises:
      ImportError: if PyTorch, of the `convert` extra, is not installed.
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not such a weight file.

    References:
      Knyazev et al., `Accelerating Training with Neuron Interaction and Nowcasting Networks
      <https://arxiv.org/abs/2409.04434>`_, ICLR 2025
    """
    state = _read_state(os.fspath(path))
    try:
        params: dict[str, Any] = {
            ours: {"kernel": jnp.asarray(state[f"{theirs}.weight"].T), "bias": jnp.asarray(state[f"{theirs}.bias"])}
            for ours, theirs in _LAYERS.items()
        }
        types = state["layer_embed.weight"][[_TYPES[role] for role in ROLES]]
        params["role"] = {"embedding": jnp.asarray(types)}
        return WNNPlus(params, record={"source": "the published weights of Knyazev et al., ICLR 2025"})
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"path={os.fspath(path)!r} is not a weight file of the published WNN+: {error!r}.") from error


def _read_state(path: str) -> dict[str, np.ndarray]:
    try:
        # pyright: ignore is for environments without it: the type check needs no PyTorch.
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("nino_mlp needs PyTorch; install it with: pip install 'wnn-jax[convert]'") from error

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in content["state_dict"].items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path={path!r} does not exist; give the path of a published .pt file.") from error
    # What reading a file of another kind raises differs with the kind and with PyTorch's version.
    except Exception as error:
        raise ValueError(f"path={path!r} cannot be read as a PyTorch file with a `state_dict` ({error!r}).") from error
