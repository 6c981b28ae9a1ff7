"""What a jump takes: time per weight, working memory, and compilation.

    python -m benchmarks.jump | tee benchmarks/jump.txt

Times are for a million weights in one kernel, in turns with a square matrix multiplication of as many operations as the
networks have multiply-adds per weight, which bounds what this machine could do. Compilation is of the forecast alone,
for a 12-layer transformer (GPT-2's sizes), a ResNet-50, and 500 layers of 64 weights. Of NiNo, which forecasts whole
models, times are for two transformers; Knyazev et al. (ICLR 2025) give 0.48 s for 3.4 million weights and 13.4 s for
111 million on an A100.
"""

import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import wnn_jax
from wnn_jax.lab.training.keys import made_by

_NUM_WEIGHTS = 1_000_000
_ROUNDS = 11
_NAMES = ("wnn", "pooled-linear", "wnn-plus", "linear")


def multiply_adds(nowcaster: Any) -> int:
    """Of a network, per weight."""
    if isinstance(nowcaster, wnn_jax.nowcasters.WNN):
        return sum(leaf.size for leaf in jax.tree.leaves(nowcaster.params["conv"]) if leaf.ndim == 2)
    layers = {name: layer for name, layer in nowcaster.params.items() if name not in ("output", "role")}
    output = np.shape(nowcaster.params["output"]["kernel"])
    return sum(np.size(layer["kernel"]) for layer in layers.values()) + output[0] * int(np.prod(output[2:]))


def print_times() -> None:
    """Prints what forecasting a million weights takes."""
    random = np.random.default_rng(0)
    start = random.normal(size=_NUM_WEIGHTS).astype(np.float32)
    history = [start + 0.01 * time * random.normal(size=_NUM_WEIGHTS).astype(np.float32) for time in range(5)]
    history = [{"kernel": jnp.asarray(snapshot)} for snapshot in history]
    print(f"{'nowcaster':>16}  {'multiply-adds':>13}  {'s per 1M':>8}  {'/ matmul':>8}")
    for name in _NAMES:
        nowcaster: Any = wnn_jax.load(name)
        run = jax.jit(lambda history, nowcaster=nowcaster: nowcaster(history, {"kernel": "conv"}, None))
        operations = 0 if name == "linear" else multiply_adds(nowcaster)
        width = 2048
        left, right = jnp.ones([width, width]), jnp.ones([width, max(operations * _NUM_WEIGHTS // width**2, 1)])
        multiply = jax.jit(jnp.matmul)
        seconds = [(_time(run, history), _time(multiply, left, right)) for _ in range(_ROUNDS)]
        took, bound = np.median(seconds[1:], axis=0)
        ratio = f"{took / bound:8.2f}" if operations else f"{'-':>8}"
        print(f"{name:>16}  {operations:13,}  {took:8.4f}  {ratio}", flush=True)


def _time(call: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - began


def trees() -> Iterator[tuple[str, Any]]:
    """Parameters of models, as shapes."""

    def shapes(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(inputs: int, outputs: int) -> Any:
        return {"kernel": shapes(inputs, outputs), "bias": shapes(outputs)}

    width = 768
    norm = {"scale": shapes(width), "bias": shapes(width)}
    block = {name: dense(width, width) for name in ("query", "key", "value", "out")}
    block |= {"up": dense(width, 4 * width), "down": dense(4 * width, width), "LayerNorm_0": norm, "LayerNorm_1": norm}
    embeddings = {"tokens": {"embedding": shapes(50257, width)}, "positions": {"embedding": shapes(1024, width)}}
    yield "transformer", embeddings | {f"block_{index}": block for index in range(12)}
    yield "resnet-50", jax.eval_shape(_ResNet50().init, jax.random.key(0), jnp.zeros([1, 64, 64, 3]))["params"]
    yield "500 small", {f"Dense_{index}": {"kernel": shapes(8, 8)} for index in range(500)}


class _ResNet50(nn.Module):
    """He et al., 2016, without its strides, which have no parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def convolve(x: jax.Array, features: int, size: int) -> jax.Array:
            return nn.BatchNorm(use_running_average=True)(nn.Conv(features, (size, size), use_bias=False)(x))

        x = convolve(x, 64, 7)
        for stage, number in enumerate((3, 4, 6, 3)):
            features = 64 * 2**stage
            for index in range(number):
                branch = nn.relu(convolve(nn.relu(convolve(x, features, 1)), features, 3))
                shortcut = convolve(x, 4 * features, 1) if index == 0 else x
                x = nn.relu(convolve(branch, 4 * features, 1) + shortcut)
        return nn.Dense(1000)(x.mean(axis=(1, 2)))


def print_compilations() -> None:
    """Prints what compiling the forecast of whole models takes."""
    print(
        f"\n{'nowcaster':>16}  {'model':>12}  {'leaves':>6}  {'weights':>11}  {'trace s':>7}  {'compile s':>9}  temp MB"
    )
    nowcasters: dict[str, Any] = {name: wnn_jax.load(name) for name in _NAMES}
    for model, params in trees():
        roles = wnn_jax.default_roles(params)
        for name, nowcaster in nowcasters.items():
            jax.clear_caches()
            began = time.perf_counter()
            forecast = jax.jit(lambda history, n=nowcaster, roles=roles: n(history, roles, None))
            lowered = forecast.lower((params,) * 5)
            traced = time.perf_counter()
            analysis: Any = lowered.compile().memory_analysis()
            done = time.perf_counter()
            leaves = jax.tree.leaves(params)
            print(
                f"{name:>16}  {model:>12}  {len(leaves):6}  {sum(leaf.size for leaf in leaves):11,}"
                f"  {traced - began:7.1f}  {done - traced:9.1f}  {analysis.temp_size_in_bytes / 1e6:7.1f}",
                flush=True,
            )


def gpt2(num_layers: int, width: int) -> Any:
    """Parameters in the form of GPT-2's, with its vocabulary, as shapes."""

    def shapes(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(inputs: int, outputs: int) -> Any:
        return {"kernel": shapes(inputs, outputs), "bias": shapes(outputs)}

    norm, heads = (
        {"scale": shapes(width), "bias": shapes(width)},
        (12, width // 12) if width % 12 == 0 else (4, width // 4),
    )
    part = {"kernel": shapes(width, *heads), "bias": shapes(*heads)}
    params: dict[str, Any] = {"wte": {"embedding": shapes(50257, width)}, "wpe": {"embedding": shapes(1024, width)}}
    for layer in range(num_layers):
        out = {"kernel": shapes(*heads, width), "bias": shapes(width)}
        params |= {
            f"Attention_{layer}": {"query": part, "key": part, "value": part, "out": out},
            f"Dense_{2 * layer}": dense(width, 4 * width),
            f"Dense_{2 * layer + 1}": dense(4 * width, width),
            f"LayerNorm_{2 * layer}": norm,
            f"LayerNorm_{2 * layer + 1}": norm,
        }
    return {**params, f"LayerNorm_{2 * num_layers}": norm}


def _random_leaves(params: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), params)


def print_nino(rounds: int) -> None:
    """Prints what a jump of NiNo takes."""
    nowcaster = wnn_jax.nowcasters.NiNo.init(jax.random.key(0))
    print(f"\n{'NiNo':>16}  {'leaves':>6}  {'weights':>11}  {'nodes s':>7}  {'compile s':>9}  {'s':>7}  temp MB")
    for num_layers, width in ((3, 64), (12, 768)):
        params = gpt2(num_layers, width)
        roles = wnn_jax.default_roles(params)
        began = time.perf_counter()
        nowcaster.check_params(params, roles)
        read = time.perf_counter()
        forecast = jax.jit(lambda history, roles=roles: nowcaster(history, roles, 10)).lower((params,) * 5).compile()
        compiled = time.perf_counter()
        analysis: Any = forecast.memory_analysis()
        history = tuple(_random_leaves(params, seed) for seed in range(5))
        seconds = np.median([_time(forecast, history) for _ in range(rounds if num_layers < 12 else 1)])
        leaves = jax.tree.leaves(params)
        print(
            f"{f'{num_layers} x {width}':>16}  {len(leaves):6}  {sum(leaf.size for leaf in leaves):11,}"
            f"  {read - began:7.1f}  {compiled - read:9.1f}  {seconds:7.2f}  {analysis.temp_size_in_bytes / 1e6:7.1f}",
            flush=True,
        )


def main() -> None:
    """Prints the tables."""
    print(", ".join(f"{name} {value}" for name, value in made_by().items()) + "\n")
    print_times()
    print_compilations()
    print_nino(rounds=5)


if __name__ == "__main__":
    main()
