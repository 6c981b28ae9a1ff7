"""Tables and figures on disk, each written whole or not at all."""

import contextlib
import csv
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from wnn_jax._files import replace_on_success

_DPI = 130


def save_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes rows as CSV. Figures that do not exist, such as NaN, are left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def load_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file, without the figures that do not exist.

    Raises:
      OSError: if the file cannot be read.
    """
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@contextlib.contextmanager
def new_figure(path: Path, *shape: int, **options: Any) -> Generator[Any]:
    """Yields a figure and its axes, and writes the figure to a file.

    Args:
      path: of a PNG file.
      *shape: numbers of rows and columns of axes.
      **options: of `matplotlib.pyplot.subplots`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_on_success(path) as temporary:
            figure.savefig(temporary, dpi=_DPI, format="png")
    finally:
        plt.close(figure)


def add_legend(figure: Any, *entries: Any, fontsize: int) -> None:
    """Puts a legend below the axes, in as many columns as fit beside each other, at most 4.

    Args:
      figure: what `new_figure` yielded.
      *entries: handles and labels. Default: those of all axes.
      fontsize: in points.
    """
    for num_columns in (4, 3, 2, 1):
        legend = figure.legend(*entries, loc="outside lower center", ncols=num_columns, fontsize=fontsize)
        if num_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""
