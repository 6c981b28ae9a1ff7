"""Tables and figures on disk, each written whole or not at all."""

import contextlib
import csv
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from wnn_jax._files import replace_on_success


def save_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV. Numbers that are not finite are left empty."""

    def cell(value: Any) -> Any:
        return value if not isinstance(value, float) else f"{value:.6g}" if math.isfinite(value) else ""

    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def load_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, without empty cells. Raises an `OSError` if the file cannot be read."""
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@contextlib.contextmanager
def new_figure(path: Path, *shape: int, **options: Any) -> Generator[Any]:
    """Yield a figure and its axes, made by `pyplot.subplots`, and write the figure as a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_on_success(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    finally:
        plt.close(figure)


def add_legend(figure: Any, *entries: Any, fontsize: int) -> None:
    """Add a legend below the axes, in as many columns as fit, at most 4."""
    for num_columns in (4, 3, 2, 1):
        legend = figure.legend(*entries, loc="outside lower center", ncols=num_columns, fontsize=fontsize)
        if num_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
