from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax

PUBLISHED = [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]  # of 10,000 steps, a nowcast every 1,000


def horizons(num_nowcasts: int, **ends: Any) -> list[int]:
    schedule = wnn_jax.decaying_horizon(num_nowcasts, **ends)
    return [int(schedule(index)) for index in range(num_nowcasts)]


def test_the_published_schedule():
    assert horizons(10) == PUBLISHED


@pytest.mark.parametrize(("first", "last"), [(40, 1), (40, 7), (1, 40), (5, 5)])
@pytest.mark.parametrize("num_nowcasts", [2, 7, 100])
def test_square_roots_are_a_line_between_the_ends(num_nowcasts: int, first: int, last: int):
    found = horizons(num_nowcasts, first=first, last=last)
    assert (found[0], found[-1]) == (first, last)
    assert found == sorted(found, reverse=first > last)
    line = np.linspace(first**0.5, last**0.5, num_nowcasts)
    np.testing.assert_allclose(found, line**2, rtol=0, atol=0.5 + 1e-9)


def test_a_single_nowcast_is_the_first():
    assert horizons(1) == [40]


def test_it_stays_at_its_ends():
    schedule = wnn_jax.decaying_horizon(10)
    assert [int(schedule(index)) for index in (-5, -1, 10, 11, 10**6)] == [40, 40, 1, 1, 1]


def test_traced_indices():
    found = jax.jit(jax.vmap(wnn_jax.decaying_horizon(10)))(jnp.arange(12))
    assert found.dtype == jnp.int32
    assert found.tolist() == [*PUBLISHED, 1, 1]


def test_arguments_may_be_integers_of_numpy():
    assert horizons(10, first=np.int64(40), last=np.int32(1)) == PUBLISHED


@pytest.mark.parametrize("name", ["num_nowcasts", "first", "last"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "3"])
def test_bad_arguments_are_refused(name: str, value: Any):
    arguments: dict[str, Any] = {"num_nowcasts": 10} | {name: value}
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an int >= 1"):
        wnn_jax.decaying_horizon(**arguments)
