"""Progress bars on a terminal, a line now and then in a log."""

import contextlib
import time
from collections.abc import Generator
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from wnn_jax.meta.end_to_end import Evaluation, Report

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how much is done, and the time left."""

    def __init__(self, description: str, *, total: int, completed: int = 0) -> None:
        self._console = Console()
        self._bars = _bars(self._console, TextColumn("{task.fields[metrics]}"), seconds_of_speed=600)
        self._description = description
        self._task = self._bars.add_task(description, total=total, completed=completed, metrics="")
        self._began = time.monotonic()
        self._lines = _Lines()
        self._metrics = ""
        self._total, self._completed, self._completed_before = total, completed, completed

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def advance(self, by: int = 1, metrics: str = "") -> None:
        """Counts what was done, and shows the metrics until there are others."""
        self._completed += by
        self._metrics = metrics or self._metrics
        self._bars.update(self._task, advance=by, metrics=self._metrics)
        is_last = self._completed >= self._total
        if not self._console.is_terminal and (is_last or self._lines.is_due()):
            seconds = time.monotonic() - self._began
            left = seconds / (self._completed - self._completed_before) * (self._total - self._completed)
            self._console.print(
                f"{self._description}: {self._completed} of {self._total}, {seconds:.0f} s, {left:.0f} s left "
                f"{self._metrics}",
                soft_wrap=True,
            )


class RunProgress:
    """Shows the current run (loss, validation accuracy, steps) and the time left for all runs."""

    def __init__(self, console: Console, *, num_runs: int, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._progress = _bars(console, TextColumn("steps  {task.fields[metrics]}"), seconds_of_speed=120)
        self._total = self._progress.add_task("all runs", total=num_runs * num_steps, metrics="")
        self._finished = 0
        self._lines = _Lines()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def run(self, name: str) -> Generator[Report]:
        """Yields the report function of one run."""
        bar = self._progress.add_task(name, total=self._num_steps, metrics="")
        accuracy = "-"

        def report(step: int, loss: float, evaluation: Evaluation | None) -> None:
            nonlocal accuracy
            if evaluation is not None:
                accuracy = f"{evaluation.accuracy:.4f}"
            self._progress.update(bar, completed=step, metrics=f"loss {loss:.3f}  accuracy {accuracy}")
            self._progress.update(self._total, completed=self._finished * self._num_steps + step)
            if evaluation is not None:
                is_last = step == self._num_steps
                if not self._console.is_terminal and (is_last or self._lines.is_due()):
                    self._console.print(
                        f"{name}: step {step}/{self._num_steps}, epoch {evaluation.epoch:.2f}, loss {loss:.4f}, "
                        f"accuracy {evaluation.accuracy:.4f}, of the EMA {evaluation.accuracy_ema:.4f}, "
                        f"{evaluation.seconds:.1f} s",
                        soft_wrap=True,
                    )

        yield report
        self._progress.remove_task(bar)
        self._finished += 1
        self._progress.update(self._total, completed=self._finished * self._num_steps)


class _Lines:
    """Tells when it is time for another line in a log."""

    def __init__(self) -> None:
        self._last = -_SECONDS_BETWEEN_LINES

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return False
        self._last = now
        return True


def _bars(console: Console, metrics: ProgressColumn, *, seconds_of_speed: float) -> Bars:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), metrics, TimeElapsedColumn())
    return Bars(
        *columns,
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=seconds_of_speed,
    )
