"""Read the weight files of NiNo and WNN+ that their authors published (PyTorch; Knyazev et al., ICLR 2025)."""

import contextlib
import functools
import os
from collections.abc import Generator
from typing import Any

import jax.numpy as jnp
import numpy as np

from wnn_jax._roles import ROLES
from wnn_jax.nowcasters._multi_horizon import NUM_HORIZONS
from wnn_jax.nowcasters.nino import NiNo
from wnn_jax.nowcasters.nino._graph import KINDS, MAX_WINDOW
from wnn_jax.nowcasters.wnn_plus import WNNPlus

_NODE_LAYERS = {"modulation": "edge_encoder", "message": "pre_nns.0.0", "node": "post_nns.0.0", "mix": "lin"}
_EDGE_LAYERS = {"edge": "lin_e", "source": "lin_s", "target": "lin_t", "output": "lin1"}
_RECORD = {"source": "the published weights of Knyazev et al., ICLR 2025"}


def nino_mlp(path: str | os.PathLike[str]) -> WNNPlus:
    """Read a weight file of the published WNN+.

    Its kinds of layers become roles: position embeddings `embedding`, and attention's queries, keys and values `dense`.

    Args:
      path: path of the `.pt` file (published as `nino_mlp.pt` and `nino_mlp_h32.pt`).

    Returns:
      A `WNNPlus` that predicts what the published PyTorch code does, to 1e-5 relative in fp32.

    Raises:
      ImportError: if PyTorch, of the `convert` extra, is not installed.
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not such a weight file.
    """
    name = os.fspath(path)
    state = _read_state(name)
    layers = {f"hidden_{index}": f"edge_mlp.fc.{2 * index}" for index in range(3)}
    layers |= {"expand": "edge_proj.fc.0", "output": "edge_mlp.fc.6"}
    with _misfit_named(name, "WNN+", state):
        params: dict[str, Any] = {ours: _pop_dense(state, theirs) for ours, theirs in layers.items()}
        kinds = [KINDS[role] for role in ROLES]
        params["role"] = {"embedding": jnp.asarray(state.pop("layer_embed.weight")[kinds])}
        return WNNPlus(params, record=_RECORD)


def nino(path: str | os.PathLike[str]) -> NiNo:
    """Read a weight file of the published NiNo.

    Args:
      path: path of the `.pt` file (published as `nino_no_posw.pt`), with any number of layers and features.

    Returns:
      A `NiNo` that predicts what the published PyTorch code does, to 1e-5 relative in fp32, if both have the same graph
      with the same eigenvectors, whose signs the published code draws at random.

    Raises:
      ImportError: if PyTorch, of the `convert` extra, is not installed.
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not such a weight file. Read a file of WNN+ with `nino_mlp`.
    """
    name = os.fspath(path)
    state = _read_state(name)
    if any(key.startswith("edge_mlp.") for key in state):
        raise ValueError(f"path={name!r} is a weight file of the published WNN+, not of NiNo: read it with nino_mlp.")
    if "wte_pos_enc_layer.weight" in state:
        raise ValueError(
            f"path={name!r} is of a NiNo with an embedding for every token of a vocabulary, which cannot be read; give "
            "the file that was published as nino_no_posw.pt."
        )
    num_rounds = len({key.split(".")[2] for key in state if key.startswith("gnn.edge_update.")})
    # The last round of nodes reaches no forecast.
    state = {key: array for key, array in state.items() if not key.startswith(f"gnn.convs.{num_rounds}.")}
    dense = functools.partial(_pop_dense, state)

    def one_round(level: int) -> dict[str, Any]:
        layers = {ours: dense(f"gnn.convs.{level}.{theirs}") for ours, theirs in _NODE_LAYERS.items()}
        edge = {ours: dense(f"gnn.edge_update.{level}.{theirs}") for ours, theirs in _EDGE_LAYERS.items()}
        return {**layers, "edge": edge}

    with _misfit_named(name, "NiNo", state):
        params = {
            "kind": {"embedding": jnp.asarray(state.pop("layer_embed.weight"))},
            "position": dense("node_proj.fc.0"),
            "weights": dense("edge_proj.fc.0"),
            "rounds": {str(level): one_round(level) for level in range(num_rounds)},
            "hidden": dense("edge_out.fc.0"),
            # In the file, horizons come after the elements of a window.
            "output": {
                ours: jnp.moveaxis(array.reshape(*array.shape[:-1], MAX_WINDOW, NUM_HORIZONS), -1, -2)
                for ours, array in dense("edge_out.fc.2").items()
            },
        }
        return NiNo(params, record=_RECORD)


@contextlib.contextmanager
def _misfit_named(path: str, network: str, state: dict[str, np.ndarray]) -> Generator[None]:
    """Name the file if reading it fails, or leaves something in its state."""
    try:
        yield
        if unread := sorted(state):
            raise ValueError(f"it has {unread[0]!r}, which the published network has not")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"path={path!r} is not a weight file of the published {network}: {error!r}.") from error


def _pop_dense(state: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    return {"kernel": jnp.asarray(state.pop(f"{name}.weight").T), "bias": jnp.asarray(state.pop(f"{name}.bias"))}


def _read_state(path: str) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # The type check needs no PyTorch.
    except ImportError as error:
        raise ImportError("nino and nino_mlp need PyTorch; install it with: pip install 'wnn-jax[convert]'") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: tensor.float().numpy() for name, tensor in content["state_dict"].items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path={path!r} does not exist; give the path of a published .pt file.") from error
    # The kind of error depends on the kind of file and on PyTorch's version.
    except Exception as error:
        raise ValueError(f"path={path!r} cannot be read as a PyTorch file with a `state_dict` ({error!r}).") from error
    if unknown := [name for name, array in state.items() if not np.isfinite(array).all()]:
        raise ValueError(f"path={path!r} has numbers that are not finite in {unknown[0]!r}; get the file again.")
    return state
