"""What a training step with `nowcast` compiles to, and what it costs on steps that do nothing."""

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import wnn_jax
from tests.helpers import DRIFTS, last_plus_one, num_bytes
from wnn_jax import averaging

pytestmark = pytest.mark.usefixtures("optimized")

# A prime that no other shape of the program has.
SIZE = 1009


class Instruction(NamedTuple):
    shape: str
    opcode: str
    rest: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")


class Program:
    """A compiled program as the text of its computations."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations: dict[str, list[Instruction]] = {}
        name = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                name = match["name"]
                self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif name and (match := _INSTRUCTION.match(line)):
                self.computations[name].append(Instruction(match["shape"], match["opcode"], match["rest"]))

    @property
    def num_conditionals(self) -> int:
        return sum(i.opcode == "conditional" for i in self.on_an_ordinary_step())

    def on_an_ordinary_step(self, computation: str | None = None) -> Iterator[Instruction]:
        """What runs while every predicate is false: the entry computation and the first branches."""
        for instruction in self.computations[computation or self.entry]:
            yield instruction
            called = _CALLED.findall(instruction.rest)
            if match := _BRANCHES.search(instruction.rest):
                branches, _, if_false = match.groups()
                called.append(branches.split(",")[0].strip().lstrip("%") if branches else if_false)
            for name in called:
                yield from self.on_an_ordinary_step(name)

    def copies_of_parameters(self) -> list[Instruction]:
        return [i for i in self.on_an_ordinary_step() if "copy" in i.opcode and str(SIZE) in i.shape]

    def parameter_sized_kernels(self) -> int:
        """The loops over a whole leaf that an ordinary step runs."""
        return sum(i.opcode in ("fusion", "copy") and str(SIZE) in i.shape for i in self.on_an_ordinary_step())


def make_params(num_leaves: int = 2) -> Any:
    return {f"Dense_{i}": {"kernel": jnp.ones((SIZE, 3)), "bias": jnp.ones(SIZE)} for i in range(num_leaves // 2)}


NOTHING = optax.identity()


@functools.cache
def compile_step(nowcaster: Any = NOTHING, history_dtype: Any = None, num_leaves: int = 2) -> jax.stages.Compiled:
    """One donated step of Adam, and then of `nowcast`, or of another transformation."""
    if not isinstance(nowcaster, optax.GradientTransformation):
        nowcaster = wnn_jax.nowcast(nowcaster, snapshot_every=7, history_dtype=history_dtype)
    tx = optax.chain(optax.adam(1e-3), nowcaster)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(lambda: make_params(num_leaves))
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()


def read(compiled: jax.stages.Compiled) -> Program:
    text = compiled.as_text()
    assert text is not None
    return Program(text)


@pytest.fixture(scope="module", params=[None, jnp.bfloat16], ids=["full", "bf16"])
def step(nowcaster: str | wnn_jax.Nowcaster, request: pytest.FixtureRequest) -> Program:
    return read(compile_step(nowcaster, request.param))


def test_the_number_of_conditionals_does_not_grow_with_the_number_of_leaves(nowcaster: str | wnn_jax.Nowcaster):
    """A window has one to record and one to jump. A drift does both in one."""
    num_conditionals = [read(compile_step(nowcaster, None, num_leaves)).num_conditionals for num_leaves in (2, 6)]
    assert num_conditionals == [1 if nowcaster in DRIFTS else 2] * 2


def test_an_ordinary_step_copies_no_parameters(step: Program, nowcaster: str | wnn_jax.Nowcaster):
    assert step.num_conditionals == (1 if nowcaster in DRIFTS else 2)
    # All of the path was read, or there would be nothing to find.
    assert {"fusion", "conditional", "parameter"} <= {i.opcode for i in step.on_an_ordinary_step()}
    assert step.copies_of_parameters() == []


def test_an_ordinary_step_passes_over_the_parameters_once_more_than_adam(step: Program):
    """Adam alone adds its updates to the parameters as it makes them; here a conditional can replace them."""
    adam = read(compile_step())
    assert adam.parameter_sized_kernels() > 0
    assert step.parameter_sized_kernels() <= adam.parameter_sized_kernels() + len(jax.tree.leaves(make_params()))


@pytest.mark.parametrize(
    ("nowcaster", "num_copies"),
    [(last_plus_one(1), 0), (last_plus_one(2), 1), ("linear", 4), ("drift", 2)],
)
def test_memory_of_the_state(nowcaster: str | wnn_jax.Nowcaster, num_copies: int):
    adam, with_nowcast = (compile_step(*arguments).memory_analysis() for arguments in ((), (nowcaster,)))
    assert adam is not None
    assert with_nowcast is not None
    # Eleven numbers, and the position of the only small tensor with its tolerance.
    history, numbers = num_copies * num_bytes(make_params()), (11 + 3 + 1) * 4
    assert with_nowcast.argument_size_in_bytes == adam.argument_size_in_bytes + history + numbers
    # All of it is donated, and its memory used again.
    assert with_nowcast.alias_size_in_bytes == adam.alias_size_in_bytes + history + numbers


# Averages


@pytest.mark.parametrize("average", [averaging.uniform(period=7), averaging.lawa(3, period=7)], ids=["uniform", "lawa"])
def test_a_step_that_does_not_count_passes_over_no_average(average: Any):
    step = read(compile_step(average))
    assert step.num_conditionals == 1
    assert {"fusion", "conditional", "parameter"} <= {i.opcode for i in step.on_an_ordinary_step()}
    assert step.copies_of_parameters() == []
    assert step.parameter_sized_kernels() == read(compile_step()).parameter_sized_kernels()
