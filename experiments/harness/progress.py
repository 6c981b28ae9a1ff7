"""A progress bar on a terminal, a line now and then in a log."""

import contextlib
import time
from collections.abc import Generator
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.harness.training import Evaluation, Report

_SECONDS_BETWEEN_LINES = 10.0


class RunProgress:
    """Shows the current run (loss, validation accuracy, steps) and the time left for all runs."""

    def __init__(self, console: Console, *, num_runs: int, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._total = self._progress.add_task("all runs", total=num_runs * num_steps, metrics="")
        self._finished = 0
        self._last_line = -_SECONDS_BETWEEN_LINES

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
                if not self._console.is_terminal and (is_last or self._is_time_for_a_line()):
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

    def _is_time_for_a_line(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True
