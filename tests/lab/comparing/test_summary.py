import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from tests.lab.comparing.runs import ACCURACY, LOSS, result
from wnn_jax.lab.comparing.plots import plot_comparison
from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.comparing.summary import Row, best_rates, steps_to, summarize, summarize_tasks
from wnn_jax.lab.comparing.tables import print_table, print_tasks
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.task import Metric

# By seed.
ACCURACIES = {
    "plain": ([0.1, 0.3, 0.5, 0.7], [0.2, 0.4, 0.6, 0.7], [0.2, 0.4, 0.5, 0.9]),
    "decayed": ([0.1, 0.2, 0.5, 0.6],) * 3,
    "fast": ([0.5, 0.7, 0.7, 0.8], [0.6, 0.8, 0.7, 0.9], [0.1, 0.2, 0.6, 0.9]),
    "slow": ([0.1, 0.1, 0.2, 0.3], [0.1, 0.1, 0.2, 0.3], [0.1, 0.1, 0.2, 0.9]),
}
RESULTS = [result(method, seed, values[seed]) for seed in range(3) for method, values in ACCURACIES.items()]


def rows(
    results: Sequence[Result] = RESULTS,
    metrics: Sequence[Metric] = (ACCURACY, LOSS),
    rates: Sequence[float] = (0.1,),
    **options: Any,
) -> dict[str, Row]:
    by_method = {result.method: rates for result in results}
    table = summarize(results, metrics, baselines=("plain", "decayed"), learning_rates=by_method, **options)
    return {row["method"]: row for row in table}


def test_steps_are_saved_to_what_the_best_baseline_has_with_the_same_seed() -> None:
    table = rows()
    assert [method for method, row in table.items() if row["is_reference"]] == ["plain"]
    assert table["plain"]["steps_saved"] == 0
    # To .7, .7 and .9: after 20 steps, halfway between 10 and 20, and after 40.
    assert table["fast"]["steps_to_target"] == 20
    assert table["fast"]["steps_saved"] == pytest.approx((0.5 + 0.625 + 0) / 3)
    assert (table["fast"]["reached"], table["fast"]["runs"]) == (3, 3)
    assert table["fast"]["target"] == pytest.approx((0.7 + 0.7 + 0.9) / 3)
    assert table["fast"]["steps_saved_low"] == 0
    assert table["fast"]["steps_saved_high"] == pytest.approx(0.625)
    assert (table["slow"]["reached"], table["slow"]["steps_saved"]) == (1, 0)
    assert (table["decayed"]["reached"], table["decayed"]["steps_to_target"]) == (0, math.inf)
    assert rows(target=0.5)["fast"]["steps_saved"] == pytest.approx((0.75 + 0.75 + (40 - 27.5) / 40) / 3)
    single = rows(RESULTS[:3])["fast"]
    assert math.isnan(single["steps_saved_low"])
    assert math.isnan(single["weights: accuracy std"])


def test_final_scores_are_of_all_evaluation_weights_and_metrics() -> None:
    fast = rows()["fast"]
    assert fast["weights"] == "weights"
    assert fast["weights: accuracy"] == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert fast["weights: accuracy std"] == pytest.approx(np.std([0.8, 0.9, 0.9], ddof=1))
    assert fast["EMA: loss"] == pytest.approx(1 - (0.7 + 0.8 + 0.8) / 3)
    assert fast["test: accuracy"] == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert fast["seconds"] == 8


def test_less_can_be_better() -> None:
    table = rows(metrics=(LOSS, ACCURACY))
    assert table["plain"]["is_reference"]
    assert table["fast"]["steps_saved"] == pytest.approx((0.5 + 0.625 + 0) / 3)
    assert table["fast"]["target"] == pytest.approx(1 - (0.7 + 0.7 + 0.9) / 3)


def test_the_evaluation_weights_that_get_there_first_count_in_every_method() -> None:
    results = [
        result("plain", 0, [0.1, 0.2, 0.3, 0.4], SWA=[0.1, 0.2, 0.3, 0.5]),
        result("averaged", 0, [0.1, 0.2, 0.3, 0.4], SWA=[0.1, 0.5, 0.5, 0.45]),
    ]
    table = rows(results)
    assert table["plain"]["target"] == 0.5
    assert table["averaged"]["steps_to_target"] == 20
    assert table["averaged"]["weights"] == "SWA"
    assert rows(results, weights="weights")["averaged"]["steps_saved"] == 0
    assert rows(results, weights="weights")["plain"]["target"] == 0.4
    with pytest.raises(UsageError, match=r"--evaluation-weights 'LAWA': the method 'plain' has only weights, EMA, SWA"):
        rows(results, weights="LAWA")


def test_the_target_is_the_best_that_the_reference_has_had() -> None:
    # A target that is the last score would be reached by the reference itself after half of its steps.
    results = [result("plain", 0, [0.1, 0.5, 0.6, 0.4]), result("fast", 0, [0.6, 0.6, 0.6, 0.6])]
    table = rows(results)
    assert table["plain"]["steps_saved"] == 0.25
    assert table["fast"]["steps_saved"] == 0.75


def test_every_method_is_at_its_own_best_rate() -> None:
    results = [
        result("plain", 0, [0.1, 0.3], rate=0.1),
        result("plain", 0, [0.1, 0.4], rate=0.2),
        result("drifting", 0, [0.1, 0.5], rate=0.1),
        result("drifting", 0, [0.1, 0.2], rate=0.2),
        result("unstable", 0, [0.1, 0.4], rate=0.1),
        result("unstable", 0, [0.1, 0.9], rate=0.2, diverged=True),
        result("unstable", 1, [0.1, 0.9], rate=0.2),
    ]
    assert best_rates(results, ACCURACY) == {"plain": 0.2, "drifting": 0.1, "unstable": 0.1}
    assert best_rates(results, LOSS) == {"plain": 0.2, "drifting": 0.1, "unstable": 0.1}
    chosen = [results[1], results[2]]
    assert not any(row["is_at_edge"] for row in rows(chosen, rates=(0.05, 0.1, 0.2, 0.4)).values())
    assert all(row["is_at_edge"] for row in rows(chosen, rates=(0.1, 0.2)).values())


def test_a_run_that_diverged_before_its_last_stage_is_in_the_table(tmp_path: Path) -> None:
    """It has the evaluation weights of the stage in which it diverged."""
    staged = [
        result("twa", 0, [0.1, math.nan], diverged=True),
        result("twa", 1, [0.1, 0.5, 0.6], TWA=[math.nan, 0.5, 0.7]),
    ]
    plain = [result("plain", seed, [0.1, 0.2, 0.3]) for seed in (0, 1)]
    table = rows([*plain, *staged])
    assert table["twa"]["diverged"] == 1
    assert math.isnan(table["twa"]["TWA: accuracy"])
    assert table["twa"]["reached"] == 1
    assert best_rates(staged, ACCURACY, "TWA") == {"twa": 0.1}
    early = [evaluation.scores for evaluation in staged[1].evaluations]
    del early[0]["TWA"]  # pyright: ignore[reportIndexIssue]
    plot_comparison(staged, staged, [table["twa"]], ACCURACY, tmp_path / "curves.png", weights="TWA")
    assert (tmp_path / "curves.png").exists()


def test_steps_to_a_score_are_interpolated() -> None:
    run = result("one", 0, [0.2, 0.4, 0.3, 0.8])
    for target, steps in ((0.2, 10), (0.3, 15), (0.55, 35), (0.9, math.inf)):
        assert steps_to(run, ACCURACY, target) == pytest.approx(steps)


def printed(print_to: Callable[[Console], None]) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        print_to(console)
    return capture.get()


def test_tables_are_printed_whole() -> None:
    table = printed(lambda console: print_table(list(rows().values()), (ACCURACY, LOSS), console))
    assert "Steps saved to accuracy 76.7%, the best score of 'plain' (mean over seeds)" in table
    for cell in ("38 (0 to 63)", "at most 0", "none", "86.7% ± 5.8%"):
        assert cell in table
    tasks = of_two_tasks()
    over_tasks = printed(lambda console: print_tasks(summarize_tasks(tasks, ("plain", "fast", "only")), tasks, console))
    for cell in ("at most 19", "of 1: 25"):
        assert cell in over_tasks
    assert "…" not in table + over_tasks


def of_two_tasks() -> dict[str, list[Row]]:
    """Make the tables of two tasks. In the second, `only` is a new method, and `fast` never gets to the target."""
    accuracies = {"plain": [0.1, 0.3, 0.5, 0.7], "fast": [0.1, 0.2, 0.3, 0.4], "only": [0.1, 0.3, 0.7, 0.7]}
    second = [result(method, seed, values) for seed in range(3) for method, values in accuracies.items()]
    return {"one": list(rows().values()), "two": list(rows(second).values())}


def test_the_mean_over_tasks_has_an_interval_over_seeds_within_them() -> None:
    table = {row["method"]: row for row in summarize_tasks(of_two_tasks(), ("only", "slow", "fast", "plain"))}
    assert list(table) == ["only", "slow", "fast", "plain"]
    fast = table["fast"]
    assert fast["steps_saved"] == pytest.approx((0.5 + 0.625 + 0) / 3 / 2)
    # All draws of the second task are 0, and so the first task's interval is halved.
    first = rows()["fast"]
    for end in ("steps_saved_low", "steps_saved_high"):
        assert fast[end] == pytest.approx(first[end] / 2)
    assert (fast["worst_task"], fast["worst"]) == ("two", 0)
    assert (fast["tasks"], fast["reached"], fast["runs"]) == (2, 3, 6)
    only = table["only"]
    assert (only["tasks"], only["steps_saved"], only["worst_task"]) == (1, 0.25, "two")
    assert (only["steps_saved_low"], only["steps_saved_high"]) == (0.25, 0.25)


def test_seeds_are_drawn_within_each_task() -> None:
    """The seeds of the two tasks cancel out: if both drew the same seeds, the mean would never move."""
    values = {"one": (0.0, 1.0), "two": (1.0, 0.0)}
    tasks = {
        name: [{"method": "a", "steps_saved": 0.5, "steps_saved_by_seed": saved, "reached": 2, "runs": 2}]
        for name, saved in values.items()
    }
    (row,) = summarize_tasks(tasks, ("a",))
    assert (row["steps_saved_low"], row["steps_saved_high"]) == (0, 1)
    single = {name: [{**each, "steps_saved_by_seed": (0.5,)} for each in task] for name, task in tasks.items()}
    assert math.isnan(summarize_tasks(single, ("a",))[0]["steps_saved_low"])


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Any]]:
    """Draw a comparison, and leave its figure open until the test ends."""

    def draw(results: list[Result], searched: list[Result] | None = None) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(plt, "close", lambda _: None)
            plot_comparison(results, searched or results, list(rows(results).values()), ACCURACY, tmp_path / "plot.png")
        return plt.gcf()

    yield draw
    plt.close("all")


def test_a_line_is_broken_where_all_runs_diverged(draw: Callable[..., Any]) -> None:
    scores = {0.1: [0.5, 0.6], 0.2: [0.1, math.nan], 0.4: [0.5, 0.7]}
    searched = [result("method", 0, values, rate=rate, diverged=rate == 0.2) for rate, values in scores.items()]
    line = draw(searched[:1], searched).axes[1].lines[0]
    np.testing.assert_array_equal(line.get_xydata(), [(0.1, 0.6), (0.2, np.nan), (0.4, 0.7)])


def test_a_legend_of_long_names_is_not_cut_off(draw: Callable[..., Any]) -> None:
    names = ["pooled-linear-trained-again~40-1+ema", "wnn-plus@1.5~40-1+ema+muon", "nino-published~40-1+ema+cosine"]
    names.append("late-phase-and-then-pooled-linear-trained-again~20+ema+adamw+wsd")
    figure = draw([result(name, 0, [0.1, 0.4, 0.6, 0.7]) for name in ("plain", *names)])
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
    assert {text.get_text().partition(",")[0] for text in legend.get_texts()} >= set(names)


def test_every_method_is_within_the_axis_or_the_legend_says_why_not(draw: Callable[..., Any]) -> None:
    outliers = [result("broken", 0, [0.1, math.nan], diverged=True), result("useless", 0, [-1e6] * 4)]
    figure = draw([*RESULTS, *outliers])
    labels = {text.get_text().partition(",")[0]: text.get_text() for text in figure.legends[0].get_texts()}
    assert set(labels) >= {*ACCURACIES, "broken", "useless"}
    assert "diverged" in labels["broken"]
    assert "off the axis" in labels["useless"]
    low, high = figure.axes[0].get_ylim()
    for line in figure.axes[0].lines:
        method = str(line.get_label()).partition(",")[0]
        if method in ACCURACIES:
            assert any(low <= value <= high for value in np.asarray(line.get_ydata()))
            assert "axis" not in labels[method]
    assert high - low < 10
