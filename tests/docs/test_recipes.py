"""Every recipe runs, is listed, and does what it says."""

import re
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
PROBLEMS = ("num_rejected", "num_cut", "num_restarts", "num_misplaced")
# Without orthogonalisation, which takes long to compile. The recipes of the frameworks test the default.
SLOW = {"nowcaster": "slow-drift"}
# Recipe -> its arguments, and what it must return. A drift is visited every ten steps, and jumps from the second visit
# on.
CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "equinox_model": ({"num_steps": 60}, {"num_nowcasts": 5}),
    "haiku_network": ({"num_steps": 60}, {"num_nowcasts": 5}),
    "linen_batch_norm": ({"num_steps": 60}, {"num_nowcasts": 5}),
    "lora": ({"num_steps": 100, **SLOW}, {"num_nowcasts": 9, "is_base_unchanged": True}),
    "nnx_optimizer": ({"num_steps": 60}, {"num_nowcasts": 5}),
    "orbax_resume": ({"num_steps": 60, "interrupted_after": 35, **SLOW}, {"num_nowcasts": 5, "is_identical": True}),
    "scan_loop": ({"num_steps": 60}, {"num_nowcasts": 5}),
    "seeds": ({"num_steps": 60, "num_seeds": 2, **SLOW}, {"num_nowcasts": 5}),
    "sharded": ({"num_steps": 40, **SLOW}, {"num_nowcasts": 3, "num_devices": 8, "share_of_history": 1 / 8}),
    "transformer": ({"num_steps": 40, **SLOW}, {"num_nowcasts": 3}),
}
SWEEP = "rate_sweep"
# `make test-all` runs the others.
QUICK = ("scan_loop",)


def run(name: str, **options: Any) -> dict[str, Any]:
    with jax.numpy_rank_promotion("allow"):  # JAX's default.
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**options)


def test_every_recipe_is_listed_and_tested():
    index = (FOLDER / "index.md").read_text()
    recipes = sorted(path.name for path in FOLDER.glob("*.py"))
    assert recipes == sorted(f"{name}.py" for name in (*CASES, SWEEP))
    assert sorted(re.findall(r"^\| .* \| \[`.*`\]\((\w+\.py)\) \|$", index, re.MULTILINE)) == recipes


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_recipe_trains_and_jumps(name: str):
    options, expected = CASES[name]
    result = run(name, **options)
    assert all(np.all(value > 0.5) for name, value in result.items() if name in ("accuracy", "accuracy_of_average"))
    values = {name: np.unique(result[name]).tolist() for name in (*expected, *PROBLEMS)}
    assert values == {name: [value] for name, value in (expected | dict.fromkeys(PROBLEMS, 0)).items()}


@pytest.mark.slow
def test_the_sweep_gives_each_method_its_own_best_learning_rate():
    for result in run(SWEEP, num_steps=60, num_seeds=2, **SLOW).values():
        assert result["learning_rate"] == min(result["validation_losses"], key=result["validation_losses"].get)
        assert result["accuracy"] > 0.5
