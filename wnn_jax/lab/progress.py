"""A progress bar on a terminal, or a line now and then in a log."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how much is done, the time so far, the time left, and metrics. `completed` was done before."""

    def __init__(self, description: str, *, total: int, completed: int = 0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._description, self._total = description, total
        self._completed = self._completed_before = completed
        self._began = time.monotonic()
        self._last_line, self._metrics = self._began - _SECONDS_BETWEEN_LINES, ""
        self._bars = Bars(
            *("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[metrics]}"),
            *(TimeElapsedColumn(), "left", TimeRemainingColumn()),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=600.0,
        )
        self._bar = self._bars.add_task(description, total=total, completed=completed, metrics="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def advance(self, by: int = 1, metrics: str = "") -> None:
        """Count what was done, and show metrics until there are others."""
        self.advance_to(self._completed + by, metrics)

    def advance_to(self, completed: int, metrics: str = "") -> None:
        """Set how much is done, and show metrics until there are others."""
        self._completed, self._metrics = completed, metrics or self._metrics
        self._bars.update(self._bar, completed=completed, metrics=self._metrics)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or completed >= self._total
        if not self._console.is_terminal and is_due:
            self._last_line = now
            line = f"{self._description}: {completed} of {self._total}, {now - self._began:.0f} s"
            if (num_new := completed - self._completed_before) > 0:
                line += f", {(now - self._began) / num_new * (self._total - completed):.0f} s left"
            self._console.print(f"{line} {self._metrics}".rstrip(), soft_wrap=True, markup=False, highlight=False)
