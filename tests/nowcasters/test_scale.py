"""What networks need for large models, and for models of many leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import wnn_jax

NAMES = ("wnn", "wnn-plus", "adaptive-linear")
BLOCK = {"query": (64, 64), "out": (64, 64), "up": (64, 256), "down": (256, 64), "wide": (96, 96)}


def lower(name: str, shapes: dict[str, tuple[int, ...]]) -> jax.stages.Lowered:
    nowcaster: Any = wnn_jax.load(name)
    params = {layer: jax.ShapeDtypeStruct(shape, jnp.float32) for layer, shape in shapes.items()}
    roles = dict.fromkeys(shapes, "dense")
    return jax.jit(lambda history: nowcaster(history, roles, None)).lower((params,) * 5)


def temporary_bytes(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    analysis: Any = lower(name, shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wnn", "wnn-plus", "adaptive-linear"])
def test_working_memory_is_bounded(name: str):
    small = temporary_bytes(name, {"Dense_0": (1000, 1000)})
    assert temporary_bytes(name, {"Dense_0": (10_000, 10_000)}) <= small + 2**16
    # With the forecast of several leaves as one array, before it is cut.
    many = temporary_bytes(name, {f"Dense_{index}": (1000, 1000) for index in range(100)})
    assert many <= small + 2**25 + 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_compiled_once_for_all_leaves_of_a_role(name: str):
    def num_instances(num_blocks: int) -> int:
        shapes = {f"{layer}_{block}": shape for block in range(num_blocks) for layer, shape in BLOCK.items()}
        # Every network has them, and nothing else.
        text = lower(name, shapes).as_text()
        return text.count("stablehlo.exponential") + text.count("stablehlo.logistic")

    assert 0 < num_instances(1) == num_instances(12)
