"""Strategies of the property tests.

The tests of this folder compare the library with plain models, and with bounds that its documentation states.
`make test` draws the same few cases each time. To search for new ones, which takes hours, run
`HYPOTHESIS_PROFILE=campaign pytest tests/properties`. The profiles are in the `conftest.py` of the repository.
"""

import math
import re
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

DTYPES = ("float32", "bfloat16", "float16", "float64")
Tree = dict[str, np.ndarray]


def num_examples(share: float) -> int:
    """Return this share of the examples of the profile, for a test that has several cases or takes long."""
    return max(int(share * hypothesis.settings().max_examples), 1)


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Draw generators for arrays, so that Hypothesis need not choose values one by one."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


# Weights that are hard on arithmetic, by a generator, times `[snapshots, 1]`, a scale per weight and a dtype's limits.
_KINDS: dict[str, Any] = {
    "walk": lambda rng, t, scale, limits: np.cumsum(rng.normal(size=(len(t), scale.size)), axis=0) * scale,
    "constant": lambda rng, t, scale, limits: np.broadcast_to(scale, (len(t), scale.size)),
    "largest": lambda rng, t, scale, limits: np.full((len(t), scale.size), np.sign(scale) * float(limits.max)),
    "denormal": lambda rng, t, scale, limits: (
        rng.integers(-5, 6, (len(t), scale.size)) * float(limits.smallest_subnormal)
    ),
    "nearly constant": lambda rng, t, scale, limits: (
        scale + float(limits.eps) * scale * rng.integers(0, 2, (len(t), scale.size))
    ),
    "far from zero": lambda rng, t, scale, limits: scale * (1 + 1e-4 * rng.normal(size=(len(t), scale.size))),
    "outlier": lambda rng, t, scale, limits: np.where(t == rng.integers(len(t)), scale, 0.1),
    "alternating": lambda rng, t, scale, limits: (-1) ** t * scale,
    "step": lambda rng, t, scale, limits: np.where(t >= rng.integers(1, len(t) + 1), scale, 0.0),
    "exponential": lambda rng, t, scale, limits: scale * 2.0 ** (rng.uniform(-8, 8) * t),
}


@st.composite
def histories(draw: st.DrawFn, num_trees: int, shapes: dict[str, tuple[int, ...]], dtype: Any) -> list[Tree]:
    """Draw a history of finite weights, of every order of magnitude that the dtype has."""
    rng, limits = draw(generators()), jnp.finfo(dtype)
    # In some histories squares have room.
    largest = float(limits.max) ** draw(st.sampled_from([0.5, 1.0]))
    lowest, highest = np.log10(float(limits.smallest_subnormal)), np.log10(largest)
    leaves: Tree = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        kind = _KINDS[draw(st.sampled_from(sorted(_KINDS)))]
        low, high = draw(st.sampled_from([(-6, 2), (lowest, highest), (highest - 2, highest)]))
        exponents = rng.uniform(low, min(high, highest), draw(st.sampled_from([1, size])))
        scale = np.broadcast_to(10.0**exponents * rng.choice([-1.0, 1.0]), size)
        with np.errstate(all="ignore"):
            leaf = np.nan_to_num(kind(rng, np.arange(num_trees)[:, None].astype(float), scale, limits), nan=0.0)
            leaves[name] = np.clip(leaf, -largest, largest).reshape(num_trees, *shape).astype(dtype)
    return [{name: leaf[index] for name, leaf in leaves.items()} for index in range(num_trees)]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw the bytes of a damaged file."""
    # Anywhere, or after a place where something begins.
    places = st.sampled_from([0, *(match.start() for match in re.finditer(rb"PK|NUMPY|\{", whole))])
    near = st.builds(lambda place, distance: min(place + distance, len(whole) - 1), places, st.integers(0, 130))
    start, other = (draw(st.one_of(st.integers(0, len(whole) - 1), near)) for _ in range(2))
    stop = min(start + draw(st.integers(1, 2000)), len(whole))
    before, part, after = whole[:start], whole[start:stop], whole[stop:]
    digit = draw(st.sampled_from([match.start() for match in re.finditer(rb"\d", whole)] or [start]))
    return draw(
        st.sampled_from(
            [
                before + bytes([whole[start] ^ 1 << draw(st.integers(0, 7))]) + whole[start + 1 :],
                whole[:digit] + draw(st.sampled_from([b"0", b"1", b"7"])) + whole[digit + 1 :],
                before,
                before + after,
                before + part + part + after,
                before + draw(st.binary(min_size=1, max_size=50)) + after,
                whole[:other] + part + whole[other + len(part) :],
                whole + draw(st.binary(min_size=1, max_size=500)),
                draw(st.binary(min_size=1, max_size=50)) + whole,
            ]
        )
    )
