"""What orthogonalising the drift takes, how exact it is, and what makes it cheaper.

    python -m benchmarks.spectral | tee benchmarks/spectral.txt

The variants differ in the steps of the iteration and in the rows of a block. Times are for the square matrices of MLPs,
which are the dearest for their number of weights, in turns with a training step of the same MLP, with the elementwise
rest of the drift, and with one matrix multiplication of as many operations; the least of several.
"""

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnn_jax
from benchmarks.overhead import make_params, steps
from wnn_jax import _orthogonal
from wnn_jax._drift import Drift
from wnn_jax._orthogonal import orthogonalize, polar
from wnn_jax.lab.training.keys import made_by

_ROUNDS = 11
_ROWS = 1024
# Layers and width.
_MODELS = ((16, 64), (8, 128), (8, 256), (4, 512), (2, 1024))


def fit_steps(smallest: float, number: int) -> list[tuple[float, float, float]]:
    """The steps that bring all singular values in `[smallest, 1]` nearest to 1.

    Each is the best quintic one for the interval that the one before leaves (Amsel et al., 2025, theorem 4.1), by the
    exchange algorithm of Remez. Beyond 1 it soon diverges: all are made for values 1 % larger, which rounding may give.
    """
    lower, upper = smallest, 1.0
    fitted: list[tuple[float, float, float]] = []
    for _ in range(number):
        low, high = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
        a = b = c = 0.0
        for _ in range(100):
            points = np.array([lower, low, high, upper])
            system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
            a, b, c, _ = (float(value) for value in np.linalg.solve(system, np.ones(4)))
            low, high = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
        fitted.append((a / 1.01, b / 1.01**3, c / 1.01**5))
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower
    return fitted


# Name, steps, and rows of a block.
_STEPS = {
    "5 of Muon, 3 cubic": ((3.4445, -4.7750, 2.0315),) * 5 + ((1.5, -0.5, 0.0),) * 3,
    "5 of Muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "6 fitted to 3e-4": fit_steps(3e-4, 6),
    "5 fitted to 1e-3": fit_steps(1e-3, 5),
    "4 fitted to 3e-3": fit_steps(3e-3, 4),
    "3 fitted to 1e-2": fit_steps(1e-2, 3),
}
_VARIANTS: tuple[tuple[str, int | None], ...] = (
    ("5 of Muon, 3 cubic", None),
    ("5 fitted to 1e-3", None),
    ("4 fitted to 3e-3", None),
    ("3 fitted to 1e-2", None),
    ("5 fitted to 1e-3", 128),
    ("4 fitted to 3e-3", 128),
    ("4 fitted to 3e-3", 64),
    ("4 fitted to 3e-3", 32),
)


def multiply_adds(rows: int, columns: int, num_steps: int) -> int:
    """Of a matrix with no more rows than columns."""
    by_products = num_steps * (2 * rows**2 * columns + rows**3)
    by_gram_matrices = 2 * rows**2 * columns + (4 * num_steps - 3) * rows**3
    return min(by_products, by_gram_matrices)


def print_accuracy() -> None:
    """Prints what becomes of singular values, over the root mean square of all."""
    random = np.random.default_rng(0)
    print("singular values after it, of matrices that have them from 1 down to 1e-3 (even in the logarithm, and 1/k)\n")
    print(
        f"{'steps':>20}  {'shape':>10}  {'values':>6}  {'float32':>13}  {'cosine':>6}  {'bfloat16':>13}  {'cosine':>6}"
    )
    for name, coefficients in _STEPS.items():
        for rows, columns in ((256, 256), (128, 1024)):
            for kind, values in (
                ("even", np.geomspace(1, 1e-3, rows)),
                ("1/k", np.maximum(1 / np.arange(1, rows + 1), 1e-3)),
            ):
                left, _, right = np.linalg.svd(random.normal(size=(rows, columns)), full_matrices=False)
                matrix = jnp.asarray(left * values @ right, jnp.float32)
                exact = _deviation(polar(matrix[None], coefficients), left, right)
                with mock.patch.object(_orthogonal, "_multiply", _multiply_in_bfloat16):
                    rough = _deviation(polar(matrix[None], coefficients), left, right)
                print(f"{name:>20}  {f'{rows}x{columns}':>10}  {kind:>6}  {exact}  {rough}", flush=True)


def _multiply_in_bfloat16(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _deviation(found: jax.Array, left: np.ndarray, right: np.ndarray) -> str:
    values = np.sum((left.T @ np.asarray(found[0], np.float64)) * right, axis=1)
    values *= len(values) ** 0.5 / np.linalg.norm(found)
    return f"{values.min():6.2f}-{values.max():6.2f}  {values.mean():6.3f}"


def print_times() -> None:
    """Prints what visits take of a training."""
    print(f"\nshares of a training step with {_ROWS} rows, for visits every 10, 20 and 50 steps, in percent\n")
    print(
        f"{'width':>5}  {'step ms':>7}  {'variant':>20}  {'block':>5}  {'visit ms':>8}  {'/ matmul':>8}"
        f"  {'10':>6}  {'20':>6}  {'50':>6}"
    )
    for num_layers, width in _MODELS:
        params = make_params(num_layers, width)
        kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
        roles = wnn_jax.default_roles(kernels)
        inputs = jax.random.normal(jax.random.key(1), [_ROWS, width])
        every_step = wnn_jax.nowcast(Drift(spectral=False), snapshot_every=1)
        adam = optax.adam(1e-4)
        runs: dict[Any, Any] = {
            "training": steps(adam, params, inputs).__next__,
            "adam": steps(adam, params, None).__next__,
            "drift": steps(optax.chain(adam, every_step), params, None).__next__,
        }
        for variant in _VARIANTS:
            name, max_rows = variant
            runs[variant] = _timer(
                lambda tree, roles=roles, name=name, max_rows=max_rows: orthogonalize(
                    tree, roles, coefficients=_STEPS[name], max_rows=max_rows
                ),
                kernels,
            )
            runs[(*variant, "matmul")] = _matmul_timer(num_layers * _operations(width, len(_STEPS[name]), max_rows))
        seconds = {key: np.empty(_ROUNDS) for key in runs}
        for index in range(_ROUNDS):
            for key, run in runs.items():
                seconds[key][index] = run()
        least = {key: float(times.min()) for key, times in seconds.items()}
        rows = [(("slow drift alone", None), least["drift"] - least["adam"], None)]
        rows += [(variant, least[variant], least[(*variant, "matmul")]) for variant in _VARIANTS]
        for (name, max_rows), visit, matmul in rows:
            shares = "  ".join(f"{100 * visit / every / least['training']:6.2f}" for every in (10, 20, 50))
            ratio = f"{visit / matmul:8.2f}" if matmul else f"{'-':>8}"
            print(
                f"{width:5}  {least['training'] * 1e3:7.1f}  {name:>20}  {max_rows or '-':>5}  {visit * 1e3:8.2f}"
                f"  {ratio}  {shares}",
                flush=True,
            )


def _operations(width: int, num_steps: int, max_rows: int | None) -> int:
    rows = min(width, max_rows or width)
    return width // rows * multiply_adds(rows, width, num_steps)


def _matmul_timer(operations: int) -> Any:
    width = 512
    left, right = jnp.ones([max(operations // width**2, 1), width]), jnp.ones([width, width])
    return _timer(jnp.matmul, left, right)


def _timer(function: Any, *arguments: Any) -> Any:
    compiled = jax.jit(function)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - began

    return run


def print_formula(
    shapes: Sequence[tuple[int, int]] = ((1024, 1024), (1024, 4096), (4096, 4096), (4096, 16384)),
) -> None:
    """Prints the operations of a visit every 10 steps beside those of a training step, by the number of rows."""
    print("\noperations of visits every 10 steps, in percent of those of a training step, by tokens per step\n")
    print(f"{'matrix':>10}  {'variant':>20}  {'block':>5}  {'1,024':>7}  {'16,384':>7}  {'131,072':>7}")
    for rows, columns in shapes:
        for name, max_rows in (*_VARIANTS, ("5 fitted to 1e-3", 256)):
            block = min(rows, max_rows or rows)
            visit = rows // block * multiply_adds(block, columns, len(_STEPS[name]))
            shares = [100 * visit / 10 / (3 * number * rows * columns) for number in (1024, 16384, 131072)]
            print(
                f"{f'{rows}x{columns}':>10}  {name:>20}  {max_rows or '-':>5}  "
                + "  ".join(f"{share:7.2f}" for share in shares)
            )


def main() -> None:
    """Prints the tables."""
    print(", ".join(f"{name} {value}" for name, value in made_by().items()) + "\n")
    print_accuracy()
    print_times()
    print_formula()
    print("\nfitted steps:")
    for name, coefficients in _STEPS.items():
        if "fitted" in name:
            print(f"{name}: " + ", ".join(f"({a:.4f}, {b:.4f}, {c:.4f})" for a, b, c in coefficients))


if __name__ == "__main__":
    main()
