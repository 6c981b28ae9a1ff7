"""A key is of a configuration: no sentence and no operation of the code changes it."""

import ast
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import wnn_jax
from tests.lab.toys import LinearRegression
from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.training import keys
from wnn_jax.lab.training.keys import describe, describe_differences, made_by, run_key
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS
from wnn_jax.lab.training.stages import TrainCoefficients

REPOSITORY = Path(__file__).parents[3]

# Every kind of method: a baseline, a rival, a rule, a network with all settings, one of two stages.
PRINT_KEYS = """
import dataclasses, optax, sys
from wnn_jax.lab.comparing.methods import find_methods
from wnn_jax.lab.training.keys import run_key
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS
from wnn_jax.lab.training.stages import TrainCoefficients
from wnn_jax.lab.tasks import load_task
from pathlib import Path
twa = Method("twa", lambda rate, steps: optax.sgd(rate), stages=(TrainCoefficients(bits=4),))
names = ["wsd", "ademamix-6", "drift", "wnn-plus@0.5~40-1+ema+muon+cosine", "twa"]
task = load_task("digits-cnn", Path("."))
for method in find_methods(names, BASE_OPTIMIZERS["adam"], own={"twa": twa}, snapshot_every=5):
    print(method.name, run_key({"task": {"name": "digits-cnn", **task.describe()}, "method": method.describe()}))
"""


def keys_of(source: Path) -> list[str]:
    program = f"import sys; sys.path.insert(0, {str(source)!r})\n{PRINT_KEYS}"
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=source).stdout.splitlines()


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Something else."))
    return ast.unparse(tree)


def test_no_docstring_and_no_comment_changes_a_key(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "wnn_jax", tmp_path / "wnn_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    for path in (tmp_path / "wnn_jax").rglob("*.py"):
        path.write_text(without_docstrings(path.read_text()))
    expected = keys_of(REPOSITORY)
    assert len({line.split()[1] for line in expected}) == 5
    assert keys_of(tmp_path) == expected


def method_key(method: Method) -> str:
    return run_key({"method": method.describe()})


def find(name: str, **options: Any) -> Method:
    (method,) = find_methods([name], BASE_OPTIMIZERS[options.pop("base", "adam")], **options)
    return method


def test_whatever_decides_the_numbers_of_a_method_changes_its_key() -> None:
    def twa(**settings: Any) -> Method:
        return Method("one", lambda rate, steps: optax.sgd(rate), stages=(TrainCoefficients(**settings),))

    methods = [
        *(find(name) for name in ("plain", "wsd", "drift", "linear", "linear@0.5", "linear~3", "linear+ema")),
        find("plain", base="sgd"),
        find("linear", snapshot_every=7),
        find("ademamix-3", weight_decay=0.1),
        find("ademamix-3"),
        twa(),
        twa(bits=4),
        twa(optimizer=lambda rate, steps: optax.sgd(rate)),
        dataclasses.replace(twa(), settings={"memory": 3}),
        dataclasses.replace(twa(), task=lambda task: task),
    ]
    assert len(set(map(method_key, methods))) == len(methods)
    assert method_key(find("linear~3")) == method_key(find("linear~3"))


def test_the_file_of_a_nowcaster_is_known_by_its_checksum(tmp_path: Path) -> None:
    nowcaster: Any = wnn_jax.load("wnn-plus")
    path = tmp_path / "mine.npz"

    def key_of(**changes: Any) -> str:
        wnn_jax.save(dataclasses.replace(nowcaster, **changes), path)
        return method_key(find(str(path)))

    trained_again = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), nowcaster.params)
    assert key_of() == key_of(record={"name": "another record"})
    assert key_of() != key_of(params=trained_again)


def test_every_part_of_a_configuration_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"task": LinearRegression().describe(), "learning_rate": 0.1, "seed": 0, "num_steps": 10}
    other = {"task": LinearRegression(noise=0.5).describe(), "learning_rate": 0.2, "seed": 1, "num_steps": 20}
    assert run_key(dict(reversed(one.items()))) == run_key(one), "the order does not count"
    assert len({run_key(one), *(run_key({**one, name: value}) for name, value in other.items())}) == 5
    before = run_key(one)
    monkeypatch.setattr(keys, "RESULTS_VERSION", keys.RESULTS_VERSION + 1)
    assert run_key(one) != before


def test_settings_are_described_in_types_that_json_has() -> None:
    description = describe(
        {"stage": TrainCoefficients(bits=4), "partial": functools.partial(optax.sgd, momentum=0.9), "pair": (1, None)}
    )
    assert json.loads(json.dumps(description)) == description
    assert description["stage"]["optimizer"] == "adam_by_cosine"
    assert description["partial"] == {"function": "sgd", "arguments": [{"momentum": 0.9}]}


def test_differences_are_named_by_their_place() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": "x" * 70}
    assert describe_differences(old, {"a": {"b": 1, "c": 3}, "d": "x"}) == [
        "a.c was 2 and is 3",
        f"d was {'x' * 12}... and is x",
    ]
    assert not describe_differences(old, dict(old))


def test_a_result_says_what_made_it() -> None:
    assert made_by()["jax"] == jax.__version__
    assert {"commit", "python", "device", "machine", "wnn_jax", "optax", "numpy"} <= set(made_by())
