import csv
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from wnn_jax.meta.report import compare, print_table, save_plot, save_table


def result(arm: str, seed: int, accuracies: list[float], *, jumps: tuple[int, ...] = ()) -> dict[str, Any]:
    evaluations = [
        {
            "step": 10 * (index + 1),
            "epoch": index + 1.0,
            "seconds": 2.0 * (index + 1),
            "train_loss": 1.0,
            "accuracy": accuracy,
            "accuracy_ema": accuracy - 0.1,
            "num_nowcasts": sum(jump <= index for jump in jumps),
            "num_rejected": 0,
        }
        for index, accuracy in enumerate(accuracies)
    ]
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": evaluations,
        "test_accuracy": accuracies[-1],
        "test_accuracy_ema": accuracies[-1] - 0.1,
    }


RESULTS = [
    result("none", 0, [0.1, 0.3, 0.5, 0.7]),
    result("fast", 0, [0.5, 0.7, 0.7, 0.8], jumps=(1,)),
    result("slow", 0, [0.1, 0.1, 0.2, 0.3]),
    result("none", 1, [0.2, 0.4, 0.6, 0.7]),
    result("fast", 1, [0.6, 0.8, 0.7, 0.9], jumps=(1,)),
    result("slow", 1, [0.1, 0.1, 0.2, 0.3]),
    result("none", 2, [0.2, 0.4, 0.5, 0.9]),
    result("fast", 2, [0.1, 0.2, 0.6, 0.9], jumps=(1,)),
    result("slow", 2, [0.1, 0.1, 0.2, 0.7]),
]


def test_the_table_has_medians_to_the_target_and_their_ratios() -> None:
    rows = compare(RESULTS, target=0.7)
    assert [(row["arm"], row["reading"]) for row in rows] == [
        ("none", "weights"),
        ("none", "EMA"),
        ("fast", "weights"),
        ("fast", "EMA"),
        ("slow", "weights"),
        ("slow", "EMA"),
    ]
    none, none_ema, fast, fast_ema, slow, _ = rows
    assert (none["epochs_to_target"], none["seconds_to_target"], none["reached"], none["runs"]) == (4.0, 8.0, 3, 3)
    assert none["speedup_epochs"] == 1.0
    assert (none_ema["reached"], none_ema["epochs_to_target"]) == (1, math.inf)
    assert (fast["epochs_to_target"], fast["epochs_min"], fast["epochs_max"]) == (2.0, 2.0, 4.0)
    assert (fast["speedup_epochs"], fast["speedup_seconds"]) == (2.0, 2.0)
    assert math.isnan(fast_ema["speedup_epochs"]), "the reference's EMA mostly fails"
    assert fast["test_mean"] == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert slow["reached"] == 1
    assert math.isnan(slow["speedup_epochs"]), "an arm that mostly fails has no speed-up"


def test_the_table_is_printed_whole() -> None:
    console = Console(width=132)
    with console.capture() as capture:
        print_table(compare(RESULTS, target=0.7), 0.7, console)
    text = capture.get()
    assert "70.00%" in text
    assert "x2.00" in text
    assert "never" in text
    assert "…" not in text


def test_the_csv_has_every_row(tmp_path: Path) -> None:
    save_table(compare(RESULTS, target=0.7), tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["none", "none", "fast", "fast", "slow", "slow"]
    assert float(rows[2]["speedup_epochs"]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    save_plot(RESULTS, 0.7, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
