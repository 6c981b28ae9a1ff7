"""Averages of weights, trained ones and late-phase weights under hostile numbers.

Held: averages of finite weights are finite, between what is averaged, and as far from the exact average as rounding
takes them; what is not finite is left out and counted, or refused by name, or stays in the one weight or member that it
was in; duplicates, single checkpoints and tiny or huge distances do what the docstrings say.
"""

import functools
import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.campaign.hostile import DTYPES, draw_leaf, draw_tree
from tests.campaign.part import Part, Verdict
from wnn_jax import averaging, late_phase
from wnn_jax.averaging._packing import BITS, pack, unpack

_SHAPES = {"kernel": (8, 6), "bias": (6,), "scale": (), "nothing": (0,)}
_LATE = {"kernel": False, "bias": True, "scale": True, "nothing": False}
_NUM_STEPS = 10
_MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[Any, ...], ...]]] = {
    "uniform": (averaging.uniform, averaging.uniform_eval_params, ((0, 1), (2, 3))),
    "lawa": (averaging.lawa, averaging.lawa_eval_params, ((3, 1, 0), (2, 2, 1), (4, 2, 5))),
    "ema": (averaging.ema, averaging.ema_eval_params, ((0.0,), (0.5,), (0.99,))),
}
_combine = jax.jit(averaging.combine)
# How far rounding may take a sum of a few numbers, in units of the last place of the largest.
_ROUNDINGS = 64


def check(rng: np.random.Generator, folder: Path) -> Verdict:
    """Draws one of the subjects, a dtype and weights."""
    subject = _SUBJECTS[rng.integers(len(_SUBJECTS))]
    dtype = jnp.dtype(DTYPES[rng.integers(len(DTYPES))])
    with jax.enable_x64(dtype == jnp.float64):
        name, failures = subject(rng, folder, dtype)
    return Verdict({name: 1}, tuple(f"{name}, {dtype}: {failure}" for failure in failures))


def _running(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    kind = str(rng.choice(list(_MAKERS)))
    options = _MAKERS[kind][2][rng.integers(len(_MAKERS[kind][2]))]
    goals = draw_tree(rng, 1 + _NUM_STEPS, _SHAPES, dtype)
    if rng.random() < 0.3:
        _spoil(rng, goals, set(rng.choice(_NUM_STEPS, rng.integers(1, 4), replace=False)))
    with np.errstate(all="ignore"):
        updates = [jax.tree.map(np.subtract, goal, tree) for tree, goal in itertools.pairwise(goals)]
        # By rounding, other weights than the goals.
        trees = [jax.tree.map(np.add, tree, update) for tree, update in zip(goals, updates, strict=False)]
    broken = {step for step, tree in enumerate(trees) if not np.isfinite(_flat(tree)).all()}
    state, average = _run(kind, options)(
        *(jax.tree.map(lambda *leaves: np.stack(leaves), *steps) for steps in (goals[:-1], updates, trees))
    )
    shares, num_broken = _shares(kind, options, broken)
    failures = [] if state.num_rejected == num_broken else [f"{state.num_rejected} rejected, and {num_broken} broken"]
    if shares:
        failures += _compare(average, [trees[step] for step in shares], list(shares.values()))
    elif _bits(average) != _bits(trees[-1]):
        failures.append("without an average there are other weights than the parameters")
    return f"{kind}{' with broken steps' if broken else ''}", [f"{options}: {failure}" for failure in failures]


@functools.cache
def _run(kind: str, options: tuple[Any, ...]) -> Any:
    make, read, _ = _MAKERS[kind]

    @jax.jit
    def run(params: Any, updates: Any, after: Any) -> Any:
        tx = make(*options)
        first, last = (jax.tree.map(lambda leaf, index=index: leaf[index], after) for index in (0, -1))
        state, _ = jax.lax.scan(
            lambda state, step: (tx.update(step[0], state, step[1])[1], None), tx.init(first), (updates, params)
        )
        return state, read(state, last)

    return run


def _shares(kind: str, options: tuple[Any, ...], broken: set[int]) -> tuple[dict[int, float], int]:
    """What share steps have in the average, and how many steps that count are broken."""
    size, period, start = (None, *options[::-1]) if kind == "uniform" else options if kind == "lawa" else (None, 1, 0)
    taken = list(range(start + period - 1, _NUM_STEPS, period))
    good = [step for step in taken if step not in broken]
    kept = good[-size:] if size is not None else good
    decay = options[0] if kind == "ema" else 1.0
    weights = {step: decay ** (len(kept) - 1 - index) for index, step in enumerate(kept)}
    total = sum(weights.values())
    return {step: weight / total for step, weight in weights.items()}, len(taken) - len(good)


def _subspace(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    form = ("deltas", "orthonormal")[rng.integers(2)]
    bits = int(rng.choice(BITS)) if form == "deltas" and rng.random() < 0.4 else None
    trees = draw_tree(rng, int(rng.choice([1, 2, 3, 5])), _SHAPES, dtype)
    event = str(rng.choice(["nothing", "nothing", "duplicates", "equal", "broken"]))
    if event == "duplicates":
        trees.append(trees[rng.integers(len(trees))])
    if event == "equal":
        trees = [trees[0]] * 3
    broken = {int(rng.integers(len(trees)))} if event == "broken" else set[int]()
    _spoil(rng, trees, broken)
    name = f"subspace of {form}{f' in {bits} bits' if bits else ''}"
    arrays = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            subspace = averaging.make_subspace(arrays, form=form, bits=bits)
        except ValueError as error:
            is_right = _is_refused_rightly(trees, broken, form, str(error))
            return f"{name}, refused", [] if is_right else [f"of {len(trees)} ({event}): {error}"]
    told = [int(index) for warning in caught for index in re.findall(r"\d+", str(warning.message))]
    kept = [tree for index, tree in enumerate(trees) if index not in told]
    failures: list[str] = []
    if broken or len(trees) < 2:
        failures.append("was not refused")
    if subspace.size != len(kept):
        failures.append(f"{subspace.size} directions, and the warning leaves {len(kept)}")
    conditioning = _conditioning(trees, form)
    if event == "duplicates" and not told:
        failures.append("there is no warning of a duplicate")
    if conditioning > 1e-4 and told:
        failures.append(f"checkpoints {told} are said to depend on others, conditioning {conditioning:.1e}")
    judge = _judge_deltas if form == "deltas" else _judge_orthonormal
    failures += judge(rng, subspace, trees, kept, conditioning)
    return name, [f"of {len(trees)} ({event}): {failure}" for failure in failures]


def _is_refused_rightly(trees: list[Any], broken: set[int], form: str, message: str) -> bool:
    if len(trees) < 2:
        return "give at least 2" in message or (bool(broken) and "not finite" in message)
    if broken:
        return f"checkpoints[{min(broken)}] has a value that is not finite" in message
    limits = jnp.finfo(_wide(trees[0]["kernel"].dtype))
    if "all the same" in message:
        return _largest([_minus(tree, trees[-1]) for tree in trees]) <= float(limits.smallest_normal)
    if "too far from one another" in message:
        return _largest(trees) > float(limits.max) / 64
    return "zero" in message and form == "orthonormal" and _largest(trees[-1:]) <= float(limits.smallest_normal)


def _judge_deltas(
    rng: np.random.Generator, subspace: Any, trees: list[Any], kept: list[Any], conditioning: float
) -> list[str]:
    del conditioning
    uniform = [1 / len(trees)] * len(trees)
    start, last = (averaging.init_coefficients(subspace, point) for point in ("mean", "last"))
    own = rng.dirichlet(np.ones(len(kept))) * rng.uniform()
    between = jax.tree.map(lambda norms: jnp.asarray(own, norms.dtype) * norms, subspace.norms)
    # In few bits each number of a direction, which is in [-1, 1], is off by half a step.
    share = 0.0 if subspace.bits is None else 1 / (2**subspace.bits - 1)
    slack = jax.tree.map(lambda x: float(np.abs(np.asarray(x, np.longdouble)).sum()) * share, between)
    slack_of_last = jax.tree.map(lambda x: float(np.abs(np.asarray(x, np.longdouble)).sum()) * share, last)
    rest = 1 - own.sum()
    failures = [f"the mean: {failure}" for failure in _compare(_combine(subspace, start), trees, uniform)]
    failures += [
        f"the last: {failure}"
        for failure in _compare(_combine(subspace, last), [trees[-1]], [1.0], slack_of_last, around=trees)
    ]
    failures += [
        f"between: {failure}"
        for failure in _compare(
            _combine(subspace, between), [*kept, *trees], [*own, *(rest * u for u in uniform)], slack
        )
    ]
    shares = averaging.averaging_coefficients(subspace, between)
    failures += [
        f"{name}: shares {of_leaf} instead of {own}"
        for name, of_leaf in shares.items()
        if subspace.norms[name].min() > 1e6 * jnp.finfo(of_leaf.dtype).smallest_normal
        and not np.allclose(of_leaf, own, rtol=1e-3, atol=1e-6)
    ]
    return failures


def _judge_orthonormal(
    rng: np.random.Generator, subspace: Any, trees: list[Any], kept: list[Any], conditioning: float
) -> list[str]:
    del kept
    failures: list[str] = []
    length = float(np.linalg.norm(np.asarray(_flat(trees[-1]), np.longdouble) / (_largest(trees) or 1)))
    starts: list[tuple[Any, list[float]]] = [
        ("mean", [1 / len(trees)] * len(trees)),
        ("last", [0.0] * (len(trees) - 1) + [1.0]),
    ]
    for start, shares in starts:
        combined = _combine(subspace, averaging.init_coefficients(subspace, start))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(combined)):
            failures.append(f"the {start} is not finite")
        elif conditioning > 1e-4:
            error = _flat(combined) - sum(share * _flat(tree) for share, tree in zip(shares, trees, strict=True))
            if np.abs(error).max() > 1e-3 * _largest(trees):
                failures.append(f"the {start} is off by {np.abs(error).max():.3g} of {_largest(trees):.3g}")
    basis = np.stack([_flat(_combine(subspace, unit)) for unit in jnp.eye(subspace.size)])
    if not np.isfinite(basis).all():
        failures.append("the basis is not finite")
    elif conditioning > 1e-4 and np.abs(basis @ basis.T - np.eye(len(basis))).max() > 0.02:
        failures.append(f"the basis is not orthonormal, conditioning {conditioning:.1e}, length {length:.1e}")
    gradient = {name: jnp.asarray(rng.normal(size=shape), trees[0][name].dtype) for name, shape in _SHAPES.items()}
    once, twice = _project_twice(subspace, gradient)
    rounding = 0.02 + 8 * float(jnp.finfo(gradient["kernel"].dtype).eps)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((once, twice))):
        failures.append("a projected gradient is not finite")
    elif conditioning > 1e-4 and np.abs(_flat(twice) - _flat(once)).max() > rounding * np.abs(_flat(once)).max():
        failures.append("projecting twice is not projecting once")
    return failures


@jax.jit
def _project_twice(subspace: Any, gradient: Any) -> tuple[Any, Any]:
    tx = averaging.project_onto_subspace(subspace)
    once, state = tx.update(gradient, tx.init(gradient))
    return once, tx.update(once, state)[0]


def _conditioning(trees: list[Any], form: str) -> float:
    """The least squared singular value of the distances from the last checkpoint, each brought to length 1."""
    with np.errstate(all="ignore"):
        moves = [_flat(tree) - _flat(trees[-1]) for tree in trees[:-1]]
        rows = [*moves, *([_flat(trees[-1])] if form == "orthonormal" else [])]
        units = []
        for row in rows:
            scaled = row / np.abs(row).max(initial=0)
            units.append(np.asarray(scaled / np.sqrt((scaled**2).sum()), np.float64))
    if not np.isfinite(units).all() or len(units) > len(units[0]):
        return 0.0
    return float(np.linalg.svd(np.stack(units), compute_uv=False).min() ** 2)


def _packing(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    bits, wide = int(rng.choice(BITS)), _wide(dtype)
    shape = list(_SHAPES.values())[rng.integers(len(_SHAPES))]
    # Directions of a subspace are smaller still.
    arrays = draw_leaf(rng, 3, shape, dtype).astype(wide) / np.asarray(16, wide)
    failures: list[str] = []
    for array in arrays:
        unpacked = unpack(pack(jnp.asarray(array), bits), bits, shape)
        exact = np.asarray(array, np.longdouble)
        half_step = (exact.max() - exact.min()) / (2**bits - 1) / 2 if exact.size else 0
        error = np.abs(np.asarray(unpacked, np.longdouble) - exact).max(initial=0)
        bound = half_step * 1.001 + _rounding([array], wide)
        if not np.isfinite(unpacked).all() or not error <= bound:
            failures.append(f"{shape} in {bits} bits is off by {error:.3g}, bound {bound:.3g}, range {half_step:.3g}")
    return "packing", failures


def _history(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    period, start = (int(rng.integers(low, 4)) for low in (1, 0))
    size = int(rng.integers(1, 4)) if rng.random() < 0.5 else None
    narrow = jnp.dtype(DTYPES[rng.integers(3)]) if rng.random() < 0.5 else None
    is_on_disk = rng.random() < 0.1
    trees = draw_tree(rng, _NUM_STEPS, _SHAPES, dtype)
    if is_on_disk:  # Orbax writes no arrays without elements.
        trees = [{name: leaf for name, leaf in tree.items() if leaf.size} for tree in trees]
    broken = {int(rng.integers(_NUM_STEPS))} if rng.random() < 0.3 else set[int]()
    _spoil(rng, trees, broken)
    history = averaging.WeightHistory(
        period=period, size=size, start_step=start, dtype=narrow, folder=folder if is_on_disk else None
    )
    told = [history.update(step, jax.tree.map(jnp.asarray, tree)) for step, tree in enumerate(trees)]
    taken = list(range(start + period - 1, _NUM_STEPS, period))
    kept = taken[-size:] if size is not None else taken
    failures = [] if [step for step, was in enumerate(told) if was] == taken else [f"told {told}"]
    if history.steps != kept:
        failures.append(f"steps {history.steps} instead of {kept}")
    for step, checkpoint in zip(history.steps, history, strict=True):
        with np.errstate(over="ignore"):
            expected = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(narrow or leaf.dtype), trees[step])
        if _bits(checkpoint) != _bits(expected):
            failures.append(f"step {step} is kept as something else")
    history.close()
    return f"history{' on disk' if is_on_disk else ''}", failures


def _members(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    num_members = int(rng.choice([1, 3]))
    noise_scale = float(rng.choice([0.0, 0.01, 0.5]))
    (params,) = draw_tree(rng, 1, _SHAPES, dtype)
    arrays = jax.tree.map(jnp.asarray, params)
    key = jax.random.key(int(rng.integers(2**31)))
    split = late_phase.split_members(arrays, _LATE, key, noise_scale, num_members=num_members)
    failures: list[str] = []
    for name, late in _LATE.items():
        if not late:
            continue
        members, exact = split.members[name], np.asarray(params[name], np.longdouble)
        scale = np.sqrt(np.mean((exact / (np.abs(exact).max() or 1)) ** 2)) * np.abs(exact).max()
        # Ten standard deviations, unless that is beyond the dtype.
        reach = 10 * noise_scale * scale + _rounding([params[name]], dtype)
        if np.abs(exact).max() + reach < float(jnp.finfo(dtype).max):
            error = np.abs(np.asarray(members, np.longdouble) - exact[None]).max()
            if not error <= reach:
                failures.append(f"{name}: members differ by {error:.3g}, where noise is {noise_scale} of {scale:.3g}")
            is_told_apart = noise_scale * scale > 8 * max(
                float(jnp.finfo(dtype).eps) * np.abs(exact).max(), float(jnp.finfo(dtype).smallest_normal)
            )
            if num_members > 1 and is_told_apart and (members[0] == members[1]).all():
                failures.append(f"{name}: the members are alike, where noise is {noise_scale} of {scale:.3g}")
    late_shapes = {name: _SHAPES[name] for name, late in _LATE.items() if late}
    of_members = draw_tree(rng, num_members, late_shapes, dtype)
    broken = {int(rng.integers(num_members))} if rng.random() < 0.3 else set[int]()
    _spoil(rng, of_members, broken)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_members)
    split = split._replace(members=split.members | stacked)
    average, _ = late_phase.average_members(split)
    failures += _dtypes(average, params)
    for name, members in stacked.items():
        # What is not finite stays in its weight.
        is_finite = np.isfinite(members).all(axis=0)
        if not (np.isfinite(average[name]) == is_finite).all():
            failures.append(f"{name}: other weights of the average are finite than of the members")
        leaves = [{name: np.where(is_finite, tree[name], np.zeros_like(tree[name]))} for tree in of_members]
        found = {name: np.where(is_finite, average[name], np.zeros_like(average[name]))}
        failures += _compare(found, leaves, [1 / num_members] * num_members)
    one = int(rng.integers(num_members))
    if _bits(late_phase.select_member(split, one)) != _bits(params | of_members[one]):
        failures.append("a selected member is not that member")
    return f"members{' with a broken one' if broken else ''}", failures


def _training(rng: np.random.Generator, folder: Path, dtype: Any) -> tuple[str, list[str]]:
    num_members = 3
    params = jax.tree.map(jnp.asarray, draw_tree(rng, 1, _SHAPES, dtype)[0])
    split = late_phase.split_members(params, _LATE, jax.random.key(0), num_members=num_members)
    gradients = draw_tree(rng, num_members, _SHAPES, dtype)
    broken = int(rng.integers(num_members))
    _spoil(rng, gradients, {broken})
    schedule = ("cycle", "parallel")[rng.integers(2)]
    after, state = _train(schedule)(split, jax.tree.map(lambda *leaves: np.stack(leaves), *gradients))
    failures: list[str] = []
    for member in set(range(num_members)) - {broken}:
        for name in (name for name, late in _LATE.items() if late):
            before, gradient = (np.asarray(tree[name], np.longdouble) for tree in (params, gradients[member]))
            expected, found = before - gradient / 10, np.asarray(after.members[name][member], np.longdouble)
            is_inside = np.abs(expected) < float(jnp.finfo(dtype).max) * 0.99
            rounding = 2 * _rounding([params[name], gradients[member][name]], dtype)
            if not (np.abs(found - expected)[is_inside] <= rounding).all():
                failures.append(f"member {member} took another step than its own, and {broken} was broken")
    if state.member != 0:
        failures.append(f"the turn is of {state.member} after a whole cycle")
    return f"training of members, {schedule}", failures


@functools.cache
def _train(schedule: Any) -> Any:
    tx = late_phase.late_phase(optax.sgd(0.1), optax.sgd(0.1), 3, schedule=schedule)

    @jax.jit
    def train(split: Any, gradients: Any) -> Any:
        state = tx.init(split)
        if schedule == "parallel":
            updates, state = tx.update(gradients, state, split)
            return optax.apply_updates(split, updates), state

        def step(carry: Any, gradient: Any) -> Any:
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (split, state), gradients)[0]

    return train


def _compare(
    average: Any, trees: list[Any], shares: list[float], slack: Any = None, around: list[Any] | None = None
) -> list[str]:
    """How an average differs from what it should be.

    Args:
      average: a tree.
      trees: what it is of.
      shares: of each.
      slack: how far each leaf may be off beyond rounding; then it need not be between those.
      around: what rounding is of; by default `trees`.
    """
    failures: list[str] = []
    for name, leaf in average.items():
        if not leaf.size:
            continue
        parts = np.stack([np.asarray(tree[name], np.longdouble) for tree in trees])
        exact = np.tensordot(np.asarray(shares, np.longdouble), parts, axes=1)
        actual = np.asarray(leaf, np.longdouble)
        rounding = _rounding([tree[name] for tree in around or trees], leaf.dtype)
        error = np.abs(actual - exact).max()
        if not np.isfinite(actual).all():
            failures.append(f"{name} is not finite, of {_describe(parts)}")
        elif error > rounding + (0.0 if slack is None else slack[name] * 1.001):
            failures.append(f"{name} is off by {error:.3g}, where rounding is {rounding:.3g}, of {_describe(parts)}")
        elif slack is None:
            tiny = 2 * float(jnp.finfo(leaf.dtype).smallest_normal)
            beyond = max((actual - parts.max(axis=0)).max(), (parts.min(axis=0) - actual).max())
            if beyond > tiny:
                failures.append(f"{name} is {beyond:.3g} outside of what it is the average of, {_describe(parts)}")
    return failures


def _rounding(leaves: list[Any], dtype: Any) -> float:
    """How far rounding may take an average of such leaves."""
    largest = max((float(np.abs(np.asarray(leaf, np.float64)).max(initial=0)) for leaf in leaves), default=0.0)
    limits, wide = jnp.finfo(dtype), jnp.finfo(_wide(dtype))
    tiny = float(limits.smallest_normal) + float(wide.smallest_normal)
    return largest * (float(limits.eps) + _ROUNDINGS * float(wide.eps)) + _ROUNDINGS * tiny


def _dtypes(tree: Any, like: Any) -> list[str]:
    return [
        f"{name} is of dtype {leaf.dtype} instead of {like[name].dtype}"
        for name, leaf in tree.items()
        if leaf.dtype != like[name].dtype
    ]


def _spoil(rng: np.random.Generator, trees: list[Any], broken: set[int]) -> None:
    """Puts a NaN or an infinity into one weight of each of these trees."""
    for index in broken:
        name = str(rng.choice([name for name, leaf in trees[index].items() if leaf.size]))
        leaf = np.array(trees[index][name])
        leaf.flat[rng.integers(leaf.size)] = rng.choice([np.nan, np.inf, -np.inf])
        trees[index] = {**trees[index], name: leaf}


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.longdouble).ravel() for leaf in jax.tree.leaves(tree)])


def _minus(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: np.asarray(a, np.longdouble) - np.asarray(b, np.longdouble), tree, other)


def _largest(trees: list[Any]) -> float:
    return max(float(np.abs(_flat(tree)).max(initial=0)) for tree in trees)


def _bits(tree: Any) -> list[bytes]:
    # What a device makes of the least numbers, 0, is not told from them.
    def flush(leaf: np.ndarray) -> np.ndarray:
        return np.where(np.abs(leaf) < jnp.finfo(leaf.dtype).smallest_normal, np.zeros_like(leaf), leaf)

    with np.errstate(all="ignore"):
        return [flush(np.asarray(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def _describe(parts: np.ndarray) -> str:
    return f"{len(parts)} from {parts.min():.3g} to {parts.max():.3g}"


_SUBJECTS = (_running, _running, _subspace, _subspace, _packing, _history, _members, _training)

PART = Part(num_cases=5_000, num_tested=4, check=check)
