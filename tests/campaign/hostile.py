"""Histories of weights that are hard on arithmetic: of every scale, constant, nearly so, far apart, and finite."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16", "float64")

Draw = Callable[[np.random.Generator, np.ndarray, np.ndarray, Any], np.ndarray]


def draw_leaf(
    rng: np.random.Generator, num_snapshots: int, shape: tuple[int, ...], dtype: Any, largest: float | None = None
) -> np.ndarray:
    """The history of one leaf.

    Args:
      rng: decides all.
      num_snapshots: how many there are.
      shape: of the leaf.
      dtype: of the leaf, a floating-point one.
      largest: the largest number in it, by default that of the dtype.

    Returns:
      `[num_snapshots, *shape]` of that dtype, finite.
    """
    size = math.prod(shape)
    limits = jnp.finfo(dtype)
    # One kind for the leaf, or another one for every weight.
    chosen = rng.integers(len(_KINDS), size=size if rng.random() < 0.25 else 1)
    window = np.zeros((num_snapshots, size))
    t = np.arange(num_snapshots, dtype=np.float64)[:, None]
    with np.errstate(all="ignore"):
        for index in np.unique(chosen):
            is_here = np.broadcast_to(chosen == index, size)
            window[:, is_here] = _KINDS[index](rng, t, _scales(rng, is_here.sum(), limits), limits)
        largest = largest or float(limits.max)
        window = np.clip(np.nan_to_num(window, nan=0.0, posinf=largest, neginf=-largest), -largest, largest)
        return window.reshape(num_snapshots, *shape).astype(dtype)


def draw_tree(rng: np.random.Generator, num_snapshots: int, shapes: dict[str, tuple[int, ...]], dtype: Any) -> Any:
    """The history of a tree of leaves, as `num_snapshots` trees of NumPy arrays; in half of them squares have room."""
    largest = float(jnp.finfo(dtype).max) ** (0.5 if rng.random() < 0.5 else 1.0)
    leaves = {name: draw_leaf(rng, num_snapshots, shape, dtype, largest) for name, shape in shapes.items()}
    return [{name: leaf[index] for name, leaf in leaves.items()} for index in range(num_snapshots)]


def _scales(rng: np.random.Generator, size: int, limits: Any) -> np.ndarray:
    """Orders of magnitude: all that the dtype has, or those of ordinary weights; one for all, or one for each."""
    least, most = np.log10(float(limits.smallest_subnormal)), np.log10(float(limits.max))
    if rng.random() < 0.5:
        least, most = max(least, -6.0), min(most, 2.0)
    exponents = rng.uniform(least, most, size if rng.random() < 0.5 else 1)
    return np.broadcast_to(10.0**exponents * rng.choice([-1.0, 1.0]), size)


def _walk(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return np.cumsum(rng.normal(size=(len(t), scale.size)), axis=0) * scale


def _denormal(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return rng.integers(-5, 6, (len(t), scale.size)) * float(limits.smallest_subnormal)


def _constant(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    value = rng.choice([0.0, 0.1, -1e30, float(limits.max), -float(limits.max), math.nan])
    return np.broadcast_to(scale if math.isnan(value) else value, (len(t), scale.size))


def _nearly_frozen(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    in_last_place = float(limits.eps) * np.abs(scale)
    ulp_or_published = in_last_place if rng.random() < 0.5 else np.maximum(in_last_place, 7e-7)
    return scale + ulp_or_published * rng.integers(0, 2, (len(t), scale.size))


def _outlier(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return np.where(t == rng.integers(len(t)), scale, rng.choice([0.0, 0.1, 1.0]))


def _alternating(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return (-1) ** t * scale


def _step(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return np.where(t >= rng.integers(1, len(t) + 1), scale, 0.0)


def _line(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return scale * (rng.choice([0.0, 1.0, 8.0]) + t / 4)


def _exponential(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return scale * 2.0 ** (rng.uniform(-8, 8) * t)


def _far_off(rng: np.random.Generator, t: np.ndarray, scale: np.ndarray, limits: Any) -> np.ndarray:
    return scale * (1 + 10 ** rng.uniform(-8, -1) * rng.normal(size=(len(t), scale.size)))


_KINDS: tuple[Draw, ...] = (
    _walk,
    _denormal,
    _constant,
    _nearly_frozen,
    _outlier,
    _alternating,
    _step,
    _line,
    _exponential,
    _far_off,
)
