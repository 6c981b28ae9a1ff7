"""Models, from shapes alone, and their neural graphs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import wnn_jax
from wnn_jax.lab.tasks.models import ARCHITECTURES, MLP, train_option
from wnn_jax.nowcasters import neural_graph
from wnn_jax.nowcasters.nino._description import build_graph
from wnn_jax.nowcasters.nino._graph import Graph
from wnn_jax.nowcasters.nino.nowcaster import tensors_of

IMAGES = jnp.zeros((1, 16, 16, 3))
TOKENS = jnp.zeros((1, 8), jnp.int32)


def init(model: nn.Module, *inputs: Any) -> Any:
    options = train_option(model, train=True)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))["params"]


def model_of(name: str) -> Any:
    return init(ARCHITECTURES[name](10), TOKENS if "transformer" in name else IMAGES)


def graph_of(params: Any, description: Any = None) -> Graph:
    description = neural_graph(params) if description is None else description
    return build_graph(description, tensors_of(params, wnn_jax.default_roles(params))[0])


def edges_of(graph: Graph, params: Any) -> list[tuple[int, int, int]]:
    """Source, target and kind of every edge, sorted."""
    edges = list(zip(graph.sources.tolist(), graph.targets.tolist(), graph.kinds.tolist(), strict=True))
    assert len(graph.blocks) == len(jax.tree.leaves(params))
    for block in graph.blocks:
        _, rows, columns = block.piece.tensor.sizes
        ends = block.ends.at(np.arange(rows * columns), np)
        edges += [(int(source), int(target), block.kind) for source, target in zip(*ends, strict=True)]
    return sorted(edges)


def kernel(*shape: int) -> Any:
    return {"kernel": jnp.zeros(shape)}


def norm(size: int = 8) -> Any:
    return {"scale": jnp.zeros(size)}


def residual_block(before: int, size: int, **others: Any) -> Any:
    convolutions = {"Conv_0": kernel(3, 3, before, size), "Conv_1": kernel(3, 3, size, size)}
    return {**convolutions, "BatchNorm_0": norm(size), "BatchNorm_1": norm(size), **others}


def block(dense: Any = None, **norms: Any) -> Any:
    """A block of a transformer."""
    parts = {name: {"kernel": jnp.zeros((8, 2, 4)), "bias": jnp.zeros((2, 4))} for name in ("query", "key", "value")}
    hidden = {"c_fc": kernel(8, 32), "c_proj": kernel(32, 8)}
    return {"attn": {**parts, "out": kernel(2, 4, 8)}, "ffn": hidden if dense is None else dense, **norms}


def transformer(*outside: str, inside: tuple[str, ...] = (), number: int = 2, **changes: Any) -> Any:
    """A transformer whose blocks are modules, with normalisation layers of these names."""
    blocks = {f"TransformerBlock_{i}": block(**{name: norm() for name in inside}) for i in range(number)}
    tables = {"wte": {"embedding": jnp.zeros((11, 8))}, "wpe": {"embedding": jnp.zeros((9, 8))}}
    return {**tables, **blocks, **{name: norm() for name in outside}, "lm_head": kernel(8, 11), **changes}


MODELS = {
    "mlp": lambda: init(MLP(10, (12, 7)), jnp.zeros((1, 2, 2, 1))),
    **{name: (lambda name=name: model_of(name)) for name in ("cnn-8-16-32", "vgg", "transformer-2x24")},
    "resnet": lambda: {
        **{"conv_init": kernel(3, 3, 3, 6), "bn_init": norm(6), "ResNetBlock_0": residual_block(6, 6)},
        "ResNetBlock_1": residual_block(6, 8, conv_proj=kernel(1, 1, 6, 8), norm_proj=norm(8)),
        "Dense_0": kernel(8, 10),
    },
    "transformer": lambda: transformer("ln_f", inside=("ln_1", "ln_2")),
}

CONVOLUTIONS = {"conv1": kernel(3, 3, 3, 8), "conv2": kernel(3, 3, 8, 8)}
