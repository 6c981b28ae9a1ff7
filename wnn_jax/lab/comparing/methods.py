"""The methods of a comparison by name: baselines, nowcasters, and alternatives to nowcasting."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax._drift import Drift
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.nowcasters import load_nowcaster
from wnn_jax.lab.training.evaluation_weights import from_state
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import (
    BASE_OPTIMIZERS,
    SCHEDULES,
    BaseOptimizer,
    ademamix,
    constant,
    muon,
    schedule_free,
    snoo,
)
from wnn_jax.lab.training.step import TrainState, View

METHOD_HELP = (
    "Methods to compare. `plain`, `cosine` and `wsd` (warm-up-stable-decay) are baselines. `ademamix-3`, `ademamix-6`, "
    "`snoo`, `lookahead`, `schedule-free`, `muon`, `lawa` and `swa` are alternatives to nowcasting. A nowcaster is a "
    "name from wnn_jax.available() or the path of a saved one. `@SCALE` behind it scales its jumps. `~HORIZON` "
    "forecasts so many snapshots ahead (`~40-1`: from 40 at first to 1 at last; not for drifts). `+ema` takes "
    "snapshots of a running mean of the weights (not for drifts). `+OPTIMIZER` "
    f"({', '.join(BASE_OPTIMIZERS)}) uses another optimizer than the rest. `+cosine` and `+wsd` decay the learning "
    "rate. Examples: `drift`, `linear@0.5`, `wnn-plus~40-1`, `drift+muon+wsd`."
)

# How many snapshots a nowcaster with a window takes in a whole run, by default.
DEFAULT_NUM_SNAPSHOTS = 30

_NOWCASTER = re.compile(
    r"(?P<name>[^@~+]+)(?P<scale>@[^@~+]+)?(?P<horizon>~(?P<first>\d+)(-(?P<last>\d+))?)?(?P<average>\+ema)?"
    rf"(?P<optimizer>\+({'|'.join(BASE_OPTIMIZERS)}))?(?P<schedule>\+({'|'.join(SCHEDULES)}))?"
)


class LookaheadView(View):
    """The fast parameters take the steps, and the slow parameters are evaluated."""

    def init(self, params: Any, model_state: Any) -> tuple[Any, Any]:
        """Begin with equal fast and slow parameters."""
        return optax.LookaheadParams.init_synced(params), model_state

    def read(self, state: TrainState) -> tuple[Any, Any]:
        """Return the fast parameters."""
        return state.params.fast, state.model_state

    def network(self, params: Any, model_state: Any) -> tuple[Any, Any]:
        """Return the slow parameters."""
        return params.slow, model_state


def standard_methods(base: BaseOptimizer, weight_decay: float = 0.0) -> dict[str, Method]:
    """Return the methods that every comparison can name, by name.

    AdEMAMix, schedule-free AdamW and Muon are optimizers themselves: they use `weight_decay` and not `base`.
    """
    over_base, own = {"optimizer": base.__name__}, {"weight_decay": weight_decay}

    def baseline(name: str, schedule: Callable[[float, int], Any]) -> Method:
        return Method(name, lambda rate, steps: base(schedule(rate, steps)), over_base, is_baseline=True)

    def behind_base(name: str, make: Callable[[int], Any], **options: Any) -> Method:
        return Method(name, lambda rate, steps: optax.chain(base(rate), make(steps)), over_base, **options)

    methods = [
        baseline("plain", constant),
        *(baseline(name, schedule) for name, schedule in SCHEDULES.items()),
        *(
            Method(f"ademamix-{alpha}", functools.partial(ademamix, alpha=alpha, weight_decay=weight_decay), own)
            for alpha in (3, 6)
        ),
        behind_base("snoo", lambda _: snoo()),
        Method("lookahead", lambda rate, _: optax.lookahead(base(rate), 5, 0.5), over_base, view=LookaheadView()),
        Method(
            "schedule-free",
            functools.partial(schedule_free, weight_decay=weight_decay),
            own,
            evaluation_weights={"schedule-free": from_state(optax.contrib.schedule_free_eval_params)},
        ),
        Method("muon", lambda rate, _: muon(rate, weight_decay=weight_decay), own),
        # The latest 5 checkpoints, which reach back a tenth of the run.
        behind_base(
            "lawa",
            lambda num_steps: averaging.lawa(5, period=max(num_steps // 50, 1)),
            evaluation_weights={"LAWA": from_state(averaging.lawa_eval_params)},
        ),
        # The second half of the run.
        behind_base(
            "swa",
            lambda num_steps: averaging.uniform(num_steps // 2, max(num_steps // 100, 1)),
            evaluation_weights={"SWA": from_state(averaging.uniform_eval_params)},
        ),
    ]
    return {method.name: method for method in methods}


def nowcast_method(
    name: str,
    base: BaseOptimizer,
    nowcaster: Any,
    *,
    snapshot_every: int | None = None,
    scale: float = 1.0,
    horizon: tuple[int, int] | None = None,
    average: bool = False,
    schedule: str | None = None,
) -> Method:
    """Return a method with a nowcaster behind the optimizer.

    A nowcaster with a window takes 30 snapshots in a run by default. It makes no jump in the last half of a snapshot's
    spacing, so that a run is not judged right after a jump. `horizon` holds the horizons of the first and the last
    jump, in snapshots. With `average`, snapshots are of the running mean of the parameters, with a memory of one
    spacing. A drift takes no `average` and no `horizon`.
    """
    if average and isinstance(nowcaster, Drift):
        raise UsageError("average=True was given, but a drift is an average itself, without snapshots; leave +ema out.")
    make_rate = SCHEDULES[schedule] if schedule else constant

    def nowcast_settings(num_steps: int) -> dict[str, Any]:
        if isinstance(nowcaster, Drift):
            return {"num_steps": num_steps, "horizon": horizon and horizon[0]}
        default = max(num_steps // DEFAULT_NUM_SNAPSHOTS, 1)
        every = snapshot_every or default
        if nowcaster.context * every > num_steps:
            raise UsageError(
                f"--snapshot-every {every}: the method {name!r} jumps first after {nowcaster.context} snapshots, and "
                f"there are {num_steps} steps; give {default}, or train for longer."
            )
        num_nowcasts = max(num_steps // (nowcaster.context * every), 1)
        return {
            "snapshot_every": every,
            "average": 1 - 1 / every if average else None,
            "horizon": horizon and wnn_jax.decaying_horizon(num_nowcasts, first=horizon[0], last=horizon[1]),
            "stop": max(num_steps - every // 2, 1),
        }

    def optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        try:
            nowcast = wnn_jax.nowcast(nowcaster, scale=scale, **nowcast_settings(num_steps))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return optax.chain(base(make_rate(learning_rate, num_steps)), nowcast)

    settings = {
        "optimizer": base.__name__,
        "snapshot_every": None if isinstance(nowcaster, Drift) else snapshot_every,
        "scale": scale,
        "horizon": horizon,
        "average": average,
        "schedule": schedule,
    }
    with contextlib.suppress(ValueError):  # A nowcaster that is code has no fingerprint.
        settings["nowcaster"] = fingerprint(nowcaster)
    return Method(name, optimizer, settings)


def find_methods(
    names: Iterable[str],
    base: BaseOptimizer,
    *,
    weight_decay: float = 0.0,
    own: Mapping[str, Method] | None = None,
    snapshot_every: int | None = None,
) -> tuple[Method, ...]:
    """Return the methods that a command line names; `METHOD_HELP` explains the names.

    An experiment's `own` methods go before the standard ones. No name, an unknown one, or one twice is a `UsageError`.
    """
    known = {**standard_methods(base, weight_decay), **(own or {})}
    bases = {**BASE_OPTIMIZERS, "muon": functools.partial(muon, weight_decay=weight_decay), "": base}
    functools.update_wrapper(bases["muon"], muon)
    methods = tuple(known[name] if name in known else _parse(name, bases, snapshot_every, known) for name in names)
    labels = [method.name for method in methods]
    if not methods or len(set(labels)) < len(labels):
        raise UsageError(f"--methods {' '.join(labels) or '(none)'} must name at least one method, and none twice.")
    return methods


def _parse(
    specification: str, bases: Mapping[str, BaseOptimizer], snapshot_every: int | None, known: Iterable[str]
) -> Method:
    """Return the method of a nowcaster. The name "" in `bases` stands for the optimizer of the comparison."""
    match = _NOWCASTER.fullmatch(specification)
    if match is None or not (Path(match["name"]).suffix == ".npz" or match["name"] in wnn_jax.available()):
        raise UsageError(
            f"--methods {specification!r} is not known. Methods: {', '.join(known)}. Nowcasters, in the form "
            f"NAME-or-FILE[@SCALE][~HORIZON][+ema][+OPTIMIZER][+cosine|+wsd]: {', '.join(wnn_jax.available())}, or the "
            "path of a saved one, which ends in .npz."
        )
    parts = match.groupdict("")
    label, nowcaster, scale = load_nowcaster(parts["name"] + parts["scale"])
    try:
        method = nowcast_method(
            label + parts["horizon"] + parts["average"] + parts["optimizer"] + parts["schedule"],
            bases[parts["optimizer"][1:]],
            nowcaster,
            snapshot_every=snapshot_every,
            scale=scale,
            horizon=(int(parts["first"]), int(parts["last"] or parts["first"])) if parts["horizon"] else None,
            average=bool(parts["average"]),
            schedule=parts["schedule"][1:] or None,
        )
        # A value out of its range is refused now and not in the middle of a comparison.
        num_steps = 100 if isinstance(nowcaster, Drift) else getattr(nowcaster, "context", 1) * (snapshot_every or 100)
        method.optimizer(1e-3, num_steps)
    except ValueError as error:
        raise UsageError(f"--methods {specification!r} cannot be used: {error}") from error
    return method
