import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    variables: dict[str, object] = {}
    with jax.numpy_rank_promotion("allow"):  # JAX's default, as a user has it.
        exec(compile(example, "README.md", "exec"), variables)
    (promised,) = re.findall(r"^print\(.*\)  # (\d+)", example, re.MULTILINE)
    assert capsys.readouterr().out == f"{promised}\n"
    assert float(str(variables["loss"])) < 0.1
