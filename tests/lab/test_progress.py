import io
import re

from rich.console import Console

from wnn_jax.lab.progress import Progress


def test_a_log_has_a_first_line_and_a_last_one() -> None:
    log = io.StringIO()
    with Progress("runs", total=5, completed=2, console=Console(file=log)) as progress:
        progress.advance(0, "loss [bold]")
        progress.advance()
        progress.advance(2)
    first, last = log.getvalue().splitlines()
    assert re.fullmatch(r"runs: 2 of 5, \d+ s loss \[bold\]", first)
    assert re.fullmatch(r"runs: 5 of 5, \d+ s, 0 s left loss \[bold\]", last)


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    screen = io.StringIO()
    with Progress("runs", total=5, console=Console(file=screen, force_terminal=True, width=120)) as progress:
        progress.advance(5, "loss 0.25")
    assert re.search(r"runs.*5/5.*loss 0\.25", screen.getvalue())
    assert "5 of 5" not in screen.getvalue()
