import functools
import gzip
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.comparing.runs import result
from wnn_jax.lab.comparing.results import (
    RUNS_FILE,
    add_result,
    has_result,
    load_results,
)
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.keys import run_key

ONE, OTHER = result("plain", 0, [0.5, 0.6]), result("drift", 1, [0.5, math.nan], diverged=True)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    assert load_results(tmp_path) == []
    add_result(tmp_path, ONE)
    add_result(tmp_path, OTHER)
    loaded = load_results(tmp_path)
    assert loaded[0] == ONE
    assert loaded[1].description == OTHER.description
    assert loaded[1].diverged
    assert math.isnan(loaded[1].evaluations[1].scores["weights"]["accuracy"])
    assert math.isnan(loaded[1].final("accuracy")["weights"])
    assert has_result(tmp_path, run_key(ONE.description))
    assert not has_result(tmp_path, run_key({**ONE.description, "seed": 7}))


def test_the_file_is_lines_that_other_programs_read(tmp_path: Path) -> None:
    add_result(tmp_path, ONE)
    with gzip.open(tmp_path / RUNS_FILE, "rt") as lines:
        (content,) = map(json.loads, lines)
    assert content["key"] == run_key(ONE.description)
    assert content["description"]["method"] == {"name": "plain"}
    assert content["metrics"][0] == {"name": "accuracy", "higher_is_better": True, "format": ".1%"}


def test_threads_that_add_results_lose_none(tmp_path: Path) -> None:
    runs = [result("plain", seed, [0.5]) for seed in range(8)]
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(functools.partial(add_result, tmp_path), runs))
    assert sorted(run.seed for run in load_results(tmp_path)) == list(range(8))


def test_a_write_that_fails_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_result(tmp_path, ONE)
    before = (tmp_path / RUNS_FILE).read_bytes()

    def fail(path: Path, content: bytes) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="the disk is full"):
        add_result(tmp_path, OTHER)
    assert (tmp_path / RUNS_FILE).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip", "no result", "another key"])
def test_a_damaged_file_is_named_and_kept(damage: str, tmp_path: Path) -> None:
    add_result(tmp_path, ONE)
    file = tmp_path / RUNS_FILE
    content = file.read_bytes()
    line = json.loads(gzip.decompress(content))
    line["description"]["seed"] = 5
    damaged = {
        "cut": content[:-20],
        "flipped": content[:100] + bytes([content[100] ^ 255]) + content[101:],
        "no gzip": b"mine",
        "no result": gzip.compress(b'{"a": 1}\n'),
        "another key": gzip.compress(json.dumps(line).encode()),
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"runs\.jsonl\.gz is damaged .* Restore it from a copy, or remove it"):
        load_results(tmp_path)
    assert file.read_bytes() == damaged


def test_results_of_the_older_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "plain.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds results of wnn_jax 0\.1, one JSON file per run"):
        load_results(tmp_path)
