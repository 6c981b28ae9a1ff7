"""A progress bar on a terminal, a line now and then in a log."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_SPEED = 600.0


class Progress:
    """Shows how much is done, the time that it took, the time left, and metrics.

    Args:
      description: what is counted, as in `"runs"`.
      total: how many there are.
      completed: how many of them were done before. The time left is estimated without them.
      console: where to show it; by default the standard output.
    """

    def __init__(self, description: str, *, total: int, completed: int = 0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._description = description
        self._total, self._completed, self._completed_before = total, completed, completed
        self._metrics = ""
        self._began = time.monotonic()
        self._last_line = self._began - _SECONDS_BETWEEN_LINES
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=_SECONDS_OF_SPEED,
        )
        self._bar = self._bars.add_task(description, total=total, completed=completed, metrics="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def advance(self, by: int = 1, metrics: str = "") -> None:
        """Counts what was done, and shows the metrics until there are others."""
        self._completed += by
        self._metrics = metrics or self._metrics
        self._bars.update(self._bar, advance=by, metrics=self._metrics)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or self._completed >= self._total
        if not self._console.is_terminal and is_due:
            self._last_line = now
            self._console.print(self._line(now - self._began), soft_wrap=True, markup=False, highlight=False)

    def _line(self, seconds: float) -> str:
        line = f"{self._description}: {self._completed} of {self._total}, {seconds:.0f} s"
        num_new = self._completed - self._completed_before
        if num_new > 0:
            line += f", {seconds / num_new * (self._total - self._completed):.0f} s left"
        return f"{line} {self._metrics}".rstrip()
