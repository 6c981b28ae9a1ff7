"""The methods of a comparison by name: plain training, nowcasters, and what an informed user would pick instead."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

import wnn_jax
from wnn_jax import averaging
from wnn_jax._drift import Drift
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.forecasting.nowcasters import load_nowcaster
from wnn_jax.lab.training.evaluation_weights import Reading
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS, BaseOptimizer, constant, cosine, muon, warmup_stable_decay
from wnn_jax.lab.training.snoo import snoo
from wnn_jax.lab.training.step import TrainState, View

METHOD_HELP = (
    "Methods to compare. By name: `plain`, `cosine` and `wsd` (warm-up-stable-decay) train as usual; `ademamix-3`, "
    "`ademamix-6`, `snoo`, `lookahead`, `schedule-free`, `muon`, `lawa` and `swa` are alternatives to nowcasting. A "
    "nowcaster is a name from wnn_jax.available() or the path of a saved one; `@SCALE` behind it scales its jumps, "
    "`~HORIZON` forecasts so many snapshots ahead (`~40-1`: from 40 at first to 1 at last; not for drifts), `+ema` "
    "gives it snapshots of the weights' running mean with a memory of one spacing (not for drifts), "
    f"`+OPTIMIZER` ({', '.join(f'`+{name}`' for name in BASE_OPTIMIZERS)}) puts it behind another optimizer than that "
    "of the comparison, `+cosine` and `+wsd` decay the learning rate: `drift`, `linear@0.5`, `wnn-plus~40-1`, "
    "`drift+muon+wsd`."
)

# Snapshots of a nowcaster that forecasts from a window of them, in a whole training.
DEFAULT_NUM_SNAPSHOTS = 30

_SCHEDULES: Mapping[str, Callable[[float, int], Any]] = {"cosine": cosine, "wsd": warmup_stable_decay}
_NOWCASTER = re.compile(
    r"(?P<name>[^@~+]+)(?P<scale>@[^@~+]+)?(?P<horizon>~(?P<first>\d+)(-(?P<last>\d+))?)?(?P<average>\+ema)?"
    rf"(?P<optimizer>\+({'|'.join(BASE_OPTIMIZERS)}))?(?P<schedule>\+({'|'.join(_SCHEDULES)}))?"
)


class LookaheadView(View):
    """The fast parameters take the steps, and the slow ones are the network."""

    def init(self, params: Any, model_state: Any) -> tuple[Any, Any]:
        """Both begin alike."""
        return optax.LookaheadParams.init_synced(params), model_state

    def read(self, state: TrainState) -> tuple[Any, Any]:
        """The fast parameters."""
        return state.params.fast, state.model_state

    def network(self, params: Any, model_state: Any) -> tuple[Any, Any]:
        """The slow parameters."""
        return params.slow, model_state


def standard_methods(base: BaseOptimizer, weight_decay: float = 0.0) -> dict[str, Method]:
    """The methods that every comparison can name, over an optimizer.

    AdEMAMix, schedule-free AdamW and Muon are optimizers themselves, so that the optimizer given is not used there.

    Args:
      base: makes the optimizer of a learning rate or a schedule of it.
      weight_decay: of those that do not use it.

    Returns:
      Name -> method.
    """

    def plain(schedule: Callable[[float, int], Any]) -> Callable[[float, int], optax.GradientTransformation]:
        return lambda learning_rate, num_steps: base(schedule(learning_rate, num_steps))

    def followed_by(make: Callable[[int], Any]) -> Callable[[float, int], optax.GradientTransformation]:
        return lambda learning_rate, num_steps: optax.chain(base(learning_rate), make(num_steps))

    methods = [
        Method("plain", plain(constant), is_plain=True),
        *(Method(name, plain(schedule), is_plain=True) for name, schedule in _SCHEDULES.items()),
        *(
            Method(f"ademamix-{alpha}", functools.partial(ademamix, alpha=alpha, weight_decay=weight_decay))
            for alpha in (3, 6)
        ),
        Method("snoo", followed_by(lambda _: snoo())),
        Method("lookahead", lambda rate, _: optax.lookahead(base(rate), 5, 0.5), view=LookaheadView()),
        Method(
            "schedule-free",
            functools.partial(schedule_free, weight_decay=weight_decay),
            readings={
                "schedule-free": Reading(
                    lambda params, state: optax.contrib.schedule_free_eval_params(state, params), is_average=True
                )
            },
        ),
        Method("muon", lambda rate, _: muon(rate, weight_decay=weight_decay)),
        # The latest 5 checkpoints, which reach back a tenth of the training.
        Method(
            "lawa",
            followed_by(lambda num_steps: averaging.lawa(5, period=max(num_steps // 50, 1))),
            readings={"LAWA": Reading(lambda params, state: averaging.lawa_eval_params(state, params))},
        ),
        # The second half of the training.
        Method(
            "swa",
            followed_by(lambda num_steps: averaging.uniform(num_steps // 2, max(num_steps // 100, 1))),
            readings={"SWA": Reading(lambda params, state: averaging.uniform_eval_params(state, params))},
        ),
    ]
    return {method.name: method for method in methods}


def ademamix(
    learning_rate: float, num_steps: int, *, alpha: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdEMAMix with a memory that grows with the training, as far as 1,000 steps.

    Its slow mean weighs `alpha` from 30 % of the training on, and less before, in proportion; the memory is a tenth of
    the steps so far.

    Args:
      learning_rate: constant.
      num_steps: length of the training.
      alpha: weight of the slow mean.
      weight_decay: as of AdamW.

    References:
      Pagliardini, Ablin, Grangier, `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_,
      ICLR 2025
    """

    def slow_decay(step: Any) -> Any:
        return jnp.minimum(0.999, 1 - 1 / (11 + 0.1 * step))

    def slow_weight(step: Any) -> Any:
        return alpha * jnp.minimum(1.0, step / (0.3 * num_steps))

    return optax.contrib.ademamix(learning_rate, b3=slow_decay, alpha=slow_weight, weight_decay=weight_decay)


def schedule_free(learning_rate: float, num_steps: int, *, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Schedule-free AdamW, warmed up over a twentieth of the training.

    Args:
      learning_rate: after the warm-up.
      num_steps: length of the training.
      weight_decay: as of AdamW.

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024
    """
    warmup_steps = max(num_steps // 20, 1)
    return optax.contrib.schedule_free_adamw(learning_rate, warmup_steps=warmup_steps, weight_decay=weight_decay)


def nowcast_method(
    name: str,
    base: BaseOptimizer,
    nowcaster: wnn_jax.Nowcaster | Drift,
    *,
    snapshot_every: int | None = None,
    scale: float = 1.0,
    horizon: tuple[int, int] | None = None,
    average: bool = False,
    schedule: Callable[[float, int], Any] = constant,
) -> Method:
    """A method with a nowcaster behind the optimizer.

    One that forecasts from a window of snapshots makes no jump in the last half of a snapshot's spacing.

    Args:
      name: of the method.
      base: makes the optimizer.
      nowcaster: what forecasts.
      snapshot_every: steps between the snapshots of one that forecasts from a window. Default: 30 snapshots in the
        whole training.
      scale: multiplies the jumps.
      horizon: of the first and of the last nowcast, in snapshots; `None` for the nowcaster's own.
      average: whether snapshots are of the running mean of the parameters, with a memory of one spacing.
      schedule: of the learning rate.

    Raises:
      UsageError: if `average` is given for a drift, which has no snapshots.
    """
    if average and isinstance(nowcaster, Drift):
        raise UsageError("average=True was given, but a drift is an average itself, without snapshots; leave +ema out.")

    def of_drift(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        # A drift takes no horizon and refuses whatever value is given, as it refuses a training without a jump.
        try:
            nowcast = wnn_jax.nowcast(
                nowcaster,
                num_steps=num_steps,
                scale=scale,
                horizon=horizon[0] if horizon else None,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        return optax.chain(base(schedule(learning_rate, num_steps)), nowcast)

    def of_window(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        assert isinstance(nowcaster, wnn_jax.Nowcaster)
        every = snapshot_every or max(num_steps // DEFAULT_NUM_SNAPSHOTS, 1)
        num_visits = nowcaster.context
        if num_visits * every > num_steps:
            raise UsageError(
                f"--snapshot-every {every}: the method {name!r} jumps first after {num_visits} snapshots, and "
                f"there are {num_steps} steps; give {max(num_steps // DEFAULT_NUM_SNAPSHOTS, 1)}, or train for longer."
            )
        horizons = None
        if horizon is not None:
            num_nowcasts = max(num_steps // (num_visits * every), 1)
            horizons = wnn_jax.decaying_horizon(num_nowcasts, first=horizon[0], last=horizon[1])
        # A run is not judged right after a jump, from which it has yet to recover.
        stop = max(num_steps - every // 2, 1)
        nowcast = wnn_jax.nowcast(
            nowcaster,
            snapshot_every=every,
            average=1 - 1 / every if average else None,
            horizon=horizons,
            scale=scale,
            stop=stop,
        )
        return optax.chain(base(schedule(learning_rate, num_steps)), nowcast)

    optimizer = of_drift if isinstance(nowcaster, Drift) else of_window
    with contextlib.suppress(ValueError):  # One that is code has no fingerprint.
        return Method(name, optimizer, nowcaster=fingerprint(nowcaster))
    return Method(name, optimizer)


def find_methods(
    names: Iterable[str],
    base: BaseOptimizer,
    *,
    weight_decay: float = 0.0,
    further: Mapping[str, Method] | None = None,
    snapshot_every: int | None = None,
) -> tuple[Method, ...]:
    """The methods that a command line names.

    Args:
      names: see `METHOD_HELP`.
      base: makes the optimizer that they train with.
      weight_decay: see `standard_methods`.
      further: an experiment's own methods by name, which go before the standard ones.
      snapshot_every: see `nowcast_method`.

    Raises:
      UsageError: if there are none, one is not known, or two are the same.
    """
    known = {**standard_methods(base, weight_decay), **(further or {})}
    bases = {**BASE_OPTIMIZERS, "muon": functools.partial(muon, weight_decay=weight_decay), "": base}
    methods = tuple(
        known[name] if name in known else _parse_nowcaster(name, bases, snapshot_every, known) for name in names
    )
    labels = [method.name for method in methods]
    if not methods or len(set(labels)) < len(labels):
        raise UsageError(f"--methods {' '.join(labels) or '(none)'} must name at least one method, and none twice.")
    return methods


def _parse_nowcaster(
    specification: str, bases: Mapping[str, BaseOptimizer], snapshot_every: int | None, known: Mapping[str, Method]
) -> Method:
    """The method of a nowcaster. The base optimizer of the name "" is that of the comparison."""
    match = _NOWCASTER.fullmatch(specification)
    if match is None or not (_is_file(match["name"]) or match["name"] in wnn_jax.available()):
        raise UsageError(
            f"--methods {specification!r} is not known. Methods: {', '.join(known)}. Nowcasters, in the form "
            f"NAME-or-FILE[@SCALE][~HORIZON][+ema][+OPTIMIZER][+cosine|+wsd]: {', '.join(wnn_jax.available())}, or the "
            "path of a saved one, which ends in .npz."
        )
    label, nowcaster, scale = load_nowcaster(f"{match['name']}{match['scale'] or ''}")
    horizon = (int(match["first"]), int(match["last"] or match["first"])) if match["horizon"] else None
    try:
        method = nowcast_method(
            "".join((label, *(match[part] or "" for part in ("horizon", "average", "optimizer", "schedule")))),
            bases[(match["optimizer"] or "+")[1:]],
            nowcaster,
            snapshot_every=snapshot_every,
            scale=scale,
            horizon=horizon,
            average=match["average"] is not None,
            schedule=_SCHEDULES[match["schedule"][1:]] if match["schedule"] else constant,
        )
        # What is out of its range is refused now rather than in the middle of a comparison.
        num_steps = 100 if isinstance(nowcaster, Drift) else nowcaster.context * (snapshot_every or 100)
        method.optimizer(1e-3, num_steps)
    except ValueError as error:
        raise UsageError(f"--methods {specification!r} cannot be used: {error}") from error
    return method


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".npz"
