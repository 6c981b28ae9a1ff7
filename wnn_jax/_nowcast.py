"""Weight nowcasting as an Optax transformation."""

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._average import AveragedWindowRule
from wnn_jax._checks import check_choice, check_float, check_float_dtype, check_int, is_injected, is_int
from wnn_jax._drift import DriftRule
from wnn_jax._history import (
    AveragedWindow,
    AveragedWindowFormat,
    DriftFormat,
    DriftHistory,
    Window,
    WindowFormat,
    check_history,
)
from wnn_jax._horizon import clip_horizon
from wnn_jax._jump import MAX_COUNT, Visit, add_counts
from wnn_jax._landmark import MISPLACED, Landmark, position_of
from wnn_jax._nowcaster import DriftNowcaster, Nowcaster, is_drift, offsets_of
from wnn_jax._roles import RolesLike, resolve_roles
from wnn_jax._store import DEFAULT_NOWCASTER, load
from wnn_jax._window import WindowRule

Schedule = Callable[[Any], Any]


class NowcastState(NamedTuple):
    """State of `nowcast`. Its structure never changes after `init`.

    Attributes:
      count: int32, the steps taken.
      history: of trees shaped and sharded like the parameters. For a nowcaster that forecasts from a window, its
        snapshots without the last one, oldest first, as a tuple of `context - 1`, with `None` in it for visits that
        its `offsets` leave out; with a `history_dtype` those after the first are differences from it; with an
        `average`, a tuple of the running mean and of the snapshots of it. For a drift, a tuple of the parameters after
        the latest visit and of the running means of the optimizer's own displacement.
      num_snapshots: int32, how many snapshots, or visits, the history has in it.
      last_snapshot: int32, the step of the latest one.
      snapshot_every: int32, the steps between them.
      num_nowcasts: int32, the jumps made.
      num_rejected: int32, the jumps not made because they were not finite.
      num_cut: int32, the weights that the bound of a jump held back, over all jumps.
      num_restarts: int32, the histories that began anew before their time: they were recorded with another
        `snapshot_every` or `start`, or the parameters were misplaced.
      num_misplaced: int32, the steps at which the parameters were not where the last update led.
      last_nowcast: int32, the step of the latest jump.
      last_size: float32, the norm of that jump beside the norm of what moves of the parameters.
      landmark: where the parameters were left.

    All counts stop at 2147483647.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    history: Window | AveragedWindow | DriftHistory
    num_snapshots: jax.Array
    last_snapshot: jax.Array
    snapshot_every: jax.Array
    num_nowcasts: jax.Array
    num_rejected: jax.Array
    num_cut: jax.Array
    num_restarts: jax.Array
    num_misplaced: jax.Array
    last_nowcast: jax.Array
    last_size: jax.Array
    landmark: Landmark


def nowcast(
    nowcaster: str | os.PathLike[str] | Nowcaster | DriftNowcaster = DEFAULT_NOWCASTER,
    *,
    snapshot_every: int | None = None,
    num_steps: int | None = None,
    average: float | None = None,
    roles: RolesLike = None,
    horizon: int | Schedule | None = None,
    scale: float | Schedule = 1.0,
    start: int = 0,
    stop: int | None = None,
    history_dtype: Any = None,
    history_memory_kind: Literal["pinned_host"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves the parameters ahead, now and then, to where they are going.

    Without any argument it follows the `Drift` of the parameters: every 10 steps they move a little further along the
    running mean of what the optimizer makes of them, with a memory that grows with the training. There is nothing to
    choose but the learning rate, whose best value is that without, or a half or a quarter of it.

    A nowcaster has one of two kinds of history. Let :math:`w_t` be the parameters after step :math:`t`, and :math:`s`
    be `snapshot_every`.

    - A *drift* is visited every :math:`s` steps. At the visit at step :math:`t`, :math:`d` is how far the optimizer
      alone has moved the parameters since the last one; jumps are no part of it. Running means of :math:`d` are kept,
      and the parameters go from :math:`w_t` to :math:`w_t + \mathrm{scale} \cdot \mathrm{nowcaster}(\text{means})`. The
      first visit only remembers the parameters.
    - A *window* has :math:`c` = `nowcaster.context` snapshots, and is complete with that of step :math:`cs`:
      :math:`H = (w_s, w_{2s}, \dots, w_{cs})`. At that step the parameters go from :math:`w_{cs}` to
      :math:`w_{cs} + \mathrm{scale} \cdot (\mathrm{nowcaster}(H) - w_{cs})`, and a new, empty window begins, so that
      none ever spans a jump. A nowcaster with `offsets` :math:`o_1 = 0, \dots, o_c` has
      :math:`H = (w_{(o_1 + 1)s}, \dots, w_{(o_c + 1)s})`, and jumps at the last of these.

    The update of such a step leads from the parameters before it to where the jump goes. At every other step the update
    passes through untouched. With a `scale` of 0 all is plain training, to the last bit. The states of the
    transformations before this one (the moments of Adam, say) are left alone.

    Nothing that goes wrong is silent; `wnn_jax.metrics` has all the counts.

    - *A jump is bounded.* In a window a weight moves by at most :math:`h` times its range, the difference of its
      largest and its smallest snapshot, where :math:`h` is the horizon, that of the nowcaster if none is given, or 5 if
      it has none; what would move further is held back there. (A window of one snapshot takes the range of the last
      step.) So a weight that did not move stays. Of a drift, a tensor moves by at most 100 times the norm of the
      longest of its means. `NowcastState.num_cut` counts the weights that were held back; `scale` comes on top of the
      bound.
    - *A jump that is not finite is not made*: the optimizer's own update is, where there is a NaN or an infinity
      anywhere in the forecast of weights that moved, or in the parameters that it leads to. `num_rejected` counts it.
    - *A history is not misread.* One that was not visited when it was due, because it was restored with another
      `snapshot_every` or `start`, begins anew, and `num_restarts` counts it. One of another kind is a `ValueError`.
    - *Parameters are where they were left*, or else the history begins anew, and `num_misplaced` counts it: something
      comes after this transformation in the chain and changes its updates, or the parameters were edited, or restored
      without this state. A few of the smallest tensors are looked at, at every step; they are elsewhere if they are
      further away than a quarter of the length of the last update. Outside of `jit` there is a warning.
    - *Nothing is recorded, and there is no jump*, once 2147483647 steps were counted.

    Args:
      nowcaster: what makes the forecast: a name from `wnn_jax.available()`, the path of a file that
        `wnn_jax.save` wrote, or any `Nowcaster` or `DriftNowcaster`.
      snapshot_every: steps between snapshots, or between visits to a drift. `None` leaves the choice to the nowcaster:
        10 for the drifts. One that forecasts from a window has no spacing of its own, and needs one: the steps of an
        epoch, as in the paper, or a thirtieth of the training.
      num_steps: length of the training in steps, if it is known. A nowcaster may use it, and a training too short for
        any jump is then an error.
      average: decay per step of a running mean of the parameters, which a window then has snapshots of; the parameters
        move by as much as the mean jumps. Of the order of `1 - 1 / snapshot_every`. It takes one more copy of the
        parameters, and a pass over it at every step. `None`: the window has snapshots of the parameters themselves.
      roles: which kind of operation each parameter belongs to: a tree of role names like the parameters, or a
        function from the parameters to such a tree. Default: `wnn_jax.default_roles`.
      horizon: how many snapshots beyond the last one to forecast, an int >= 1 or a schedule of the nowcast's
        index (0 for the first). Only for nowcasters that take one; `None` leaves the choice to the nowcaster.
      scale: how far to go along the jump, from where the optimizer's own step leads to the forecast: a float or a
        schedule of the nowcast's index. 0 is plain training exactly, 1 the forecast, more goes beyond it.
      start: the first step that may take a snapshot. Steps are numbered from 0, as by Optax's schedules.
        Snapshots stay on the multiples of `snapshot_every` whatever `start` is.
      stop: the first step that may no longer jump; `None` for never.
      history_dtype: a floating-point dtype in which to keep the means of a drift, or the snapshots of a window after
        the first, as differences from it. With `bfloat16` and float32 parameters a drift takes 1.5 copies of the
        parameters instead of 2, and a window of 5 snapshots 2.5 instead of 4, with forecasts as good
        (`benchmarks/history.txt`). Leaves of a window that are as narrow already are kept as they are. `None`: the
        snapshots as the parameters are, and means in float32 at least.
      history_memory_kind: `"pinned_host"`, to keep the history in the memory of the host; it comes to the device
        when it is written and when a jump is made. Experimental. `None`: where the parameters are.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `NowcastState`. Its `update` needs `params` and ignores
      extra arguments that it does not know.

    Raises:
      ValueError: if an argument is out of its range, or does not fit the nowcaster; at `init`, if a parameter
        is not of a real floating-point type, if `roles` does not match the parameters, or if the device has no
        memory of that kind; at `update`, if `params` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import wnn_jax
      >>> tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast("linear", snapshot_every=2))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for step in range(10):
      ...     gradient = {"w": jnp.array([1.0, -1.0])}
      ...     updates, state = tx.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["w"].round(3))  # 10 steps of 0.1 each, and the forecast 5 snapshots = 10 steps ahead
      [-1.  4.]

    References:
      Jang et al., `Learning to Boost Training by Periodic Nowcasting Near Future Weights
      <https://proceedings.mlr.press/v202/jang23b.html>`_, ICML 2023

    .. note::
      `nowcast` comes last in a chain: it replaces what the transformations before it made of the step, and its
      snapshots are of the parameters after that step. In particular

      - gradient accumulation goes inside: `chain(MultiSteps(...), nowcast(...))` counts micro-steps, so that
        `snapshot_every` is best a multiple of their number, and jumps at most once per cycle of them; in
        `MultiSteps(chain(..., nowcast(...)))` `snapshot_every` counts full steps, and the forecast is computed, and
        thrown away, on micro-steps too;
      - under `optax.masked` and `optax.partition` give `roles` as a function (or leave it out), because this
        transformation then sees a part of the parameters;
      - under `optax.inject_hyperparams` name a callable `nowcaster` or `roles` in `static_args`, or it is
        taken for a schedule;
      - `init` gives the history the shardings of the parameters it is called with; under `jit` that takes
        explicit mesh axes, or `out_shardings` made with `optax.tree.map_params`;
      - `jax.vmap` over seeds keeps the forecast inside a conditional: it runs only on steps on which some
        member of the batch jumps.
    """
    if isinstance(nowcaster, (str, os.PathLike)):
        nowcaster = load(nowcaster)
    first_jump_after = _check_nowcaster(nowcaster)
    snapshot_every = _check_snapshot_every(snapshot_every, nowcaster)
    start = check_int("start", start, "the first step that may take a snapshot", minimum=0, or_injected=True)
    if stop is not None:
        meaning = "the first step that may no longer jump, or None for never"
        stop = check_int("stop", stop, meaning, minimum=1, or_injected=True)
        if not is_injected(start) and not is_injected(stop) and stop <= start:
            raise ValueError(f"stop={stop} must be greater than start={start}; pass stop=None to never stop.")
    if num_steps is not None:
        num_steps = check_int("num_steps", num_steps, "the length of the training, if it is known", minimum=1)
        _check_jumps(num_steps, snapshot_every, first_jump_after, start, stop)
    _check_takes_horizon(horizon, nowcaster)
    if horizon is not None and not callable(horizon):
        meaning = "the number of snapshots to forecast ahead, or a schedule of it"
        horizon = check_int("horizon", horizon, meaning, minimum=1, or_injected=True)
    if not callable(scale):
        scale = check_float("scale", scale, "how far to go along the jump, or a schedule of it", or_injected=True)
    if history_dtype is not None:
        meaning = "what to keep the history in, or None for the default"
        check_float_dtype("history_dtype", history_dtype, meaning)
    if history_memory_kind is not None:
        meaning = "the memory to keep the history in, or None for where the parameters are"
        check_choice("history_memory_kind", history_memory_kind, ("pinned_host",), meaning)
    if average is not None:
        meaning = "the decay per step of the running mean that a window has snapshots of, or None for the parameters"
        average = check_float("average", average, meaning, minimum=0, below=1, or_injected=True)
        if is_drift(nowcaster):
            raise ValueError(
                f"average={average!r} was given, but {type(nowcaster).__name__} goes by a drift, which is an average "
                "itself. Leave average out, or pass a nowcaster that forecasts from a window of snapshots."
            )
    if is_drift(nowcaster):
        history_format = DriftFormat(nowcaster.num_means, history_dtype, history_memory_kind)
        rule = DriftRule(nowcaster, history_format, num_steps)
    else:
        window_format = WindowFormat(offsets_of(nowcaster), history_dtype, history_memory_kind)
        rule = WindowRule(nowcaster, window_format)
        if average is not None:
            rule = AveragedWindowRule(rule, AveragedWindowFormat(average, window_format))

    warn_of_misplaced = _make_warning()

    def init_fn(params: Any) -> NowcastState:
        _check_params(params)
        resolved = resolve_roles(roles, params)
        if (check_nowcaster_params := getattr(nowcaster, "check_params", None)) is not None:
            check_nowcaster_params(params, resolved)
        if history_memory_kind is not None:
            _check_memory_kind(history_memory_kind)
        # One by one, for each is to have a buffer of its own.
        return NowcastState(
            count=jnp.zeros([], jnp.int32),
            history=rule.history.init(params),
            num_snapshots=jnp.zeros([], jnp.int32),
            last_snapshot=jnp.zeros([], jnp.int32),
            snapshot_every=jnp.zeros([], jnp.int32),
            num_nowcasts=jnp.zeros([], jnp.int32),
            num_rejected=jnp.zeros([], jnp.int32),
            num_cut=jnp.zeros([], jnp.int32),
            num_restarts=jnp.zeros([], jnp.int32),
            num_misplaced=jnp.zeros([], jnp.int32),
            last_nowcast=jnp.zeros([], jnp.int32),
            last_size=jnp.zeros([], jnp.float32),
            landmark=Landmark.unknown(params),
        )

    @jax.named_scope("nowcast")
    def update_fn(updates: Any, state: NowcastState, params: Any = None, **extra_args: Any) -> tuple[Any, NowcastState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        check_history(state.history, rule.history, params, nowcaster)
        count = state.count
        position = position_of(params)
        is_misplaced = Landmark(*state.landmark).is_missed(position)  # A checkpoint may have made a plain tuple of it.
        warn_of_misplaced(is_misplaced)
        num_snapshots = jnp.where(is_misplaced, 0, state.num_snapshots)
        is_due = (count % snapshot_every == snapshot_every - 1) & (count >= start) & (count < MAX_COUNT)
        if stop is not None:
            is_due &= count < stop
        index = state.num_nowcasts + state.num_rejected
        is_continued = (state.snapshot_every == snapshot_every) & (count - state.last_snapshot == snapshot_every)
        visit = Visit(
            is_first=(count == 0) | is_misplaced,
            is_due=is_due,
            # A history that was visited at other steps than these is of no use any more: another begins.
            num_snapshots=jnp.where(is_continued, num_snapshots, 0),
            snapshot_every=snapshot_every,
            horizon=clip_horizon(horizon(index)) if callable(horizon) else horizon,
            scale=scale(index) if callable(scale) else scale,
        )
        outcome = rule.update(visit, updates, cast(Any, state.history), params, resolve_roles(roles, params))
        made, is_jump = outcome.jump, outcome.is_jump
        has_restarted = (state.num_snapshots > 0) & (is_misplaced | (is_due & ~is_continued))
        return outcome.updates, NowcastState(
            count=cast(jax.Array, optax.safe_increment(count)),
            history=outcome.history,
            num_snapshots=jnp.where(is_due, rule.count(visit, outcome), num_snapshots),
            last_snapshot=jnp.where(is_due, count, state.last_snapshot),
            snapshot_every=jnp.where(is_due, jnp.asarray(snapshot_every, jnp.int32), state.snapshot_every),
            num_nowcasts=add_counts((state.num_nowcasts, made.is_accepted)),
            num_rejected=add_counts((state.num_rejected, is_jump & ~made.is_accepted)),
            num_cut=add_counts((state.num_cut, made.num_cut)),
            num_restarts=add_counts((state.num_restarts, has_restarted)),
            num_misplaced=add_counts((state.num_misplaced, is_misplaced)),
            last_nowcast=jnp.where(made.is_accepted, count, state.last_nowcast),
            last_size=jnp.where(made.is_accepted, made.size, state.last_size),
            landmark=Landmark.of_step(params, outcome.updates, position),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _check_nowcaster(nowcaster: Any) -> int:
    """The number of visits before the first jump of a nowcaster, itself included."""
    if not isinstance(nowcaster, type) and callable(nowcaster):
        if is_drift(nowcaster) and nowcaster.num_means >= 1:
            return 2
        context: Any = getattr(nowcaster, "context", None)
        if is_int(context) and context >= 1:
            return offsets_of(cast(Nowcaster, nowcaster))[-1] + 1
    raise ValueError(
        f"nowcaster={nowcaster!r} is not a nowcaster: it must be callable and have a positive int `context`, or the "
        "members of wnn_jax.DriftNowcaster. Pass a name from wnn_jax.available(), the path of a saved nowcaster, or "
        "make one with wnn_jax.leafwise."
    )


def _check_snapshot_every(snapshot_every: Any, nowcaster: Any) -> int:
    if snapshot_every is None:
        snapshot_every = getattr(nowcaster, "snapshot_every", None)
        if snapshot_every is None:
            raise ValueError(
                f"snapshot_every=None: {type(nowcaster).__name__.lstrip('_')} forecasts from a window of snapshots and "
                "has no spacing of its own. Give the number of steps between two snapshots: those of one epoch, or a "
                "thirtieth of the training (snapshot_every=max(num_steps // 30, 1))."
            )
    meaning = "the number of optimizer steps between snapshots"
    return check_int("snapshot_every", snapshot_every, meaning, minimum=1, or_injected=True)


def _check_jumps(num_steps: int, snapshot_every: Any, first_jump_after: int, start: Any, stop: Any) -> None:
    """Raises a `ValueError` if a training has no jump."""
    if any(is_injected(value) for value in (snapshot_every, start, stop)):
        return
    end = num_steps if stop is None else min(stop, num_steps)
    if (start // snapshot_every + first_jump_after) * snapshot_every <= end:
        return
    # With any spacing up to this, wherever between two multiples of it `start` is.
    largest = (end - start) // first_jump_after
    remedy = f"Pass a spacing of at most {largest}, or train for longer." if largest > 0 else "Train for longer."
    raise ValueError(
        f"snapshot_every={snapshot_every} is too large for num_steps={num_steps}: the first jump comes with snapshot "
        f"number {first_jump_after}, and there is none in the steps from {start} to {end}. {remedy}"
    )


def _check_takes_horizon(horizon: Any, nowcaster: Nowcaster | DriftNowcaster) -> None:
    if horizon is None:
        return
    if is_drift(nowcaster):
        raise ValueError(
            f"horizon={horizon!r} was given, but {type(nowcaster).__name__} moves the parameters along a drift and has "
            "no horizon. Leave horizon out; `scale` changes the length of the jumps."
        )
    if not getattr(nowcaster, "takes_horizon", True):
        raise ValueError(
            f"horizon={horizon!r} was given, but {type(nowcaster).__name__} takes none: its horizon is fixed by its "
            "training. Leave horizon out; `scale` changes the length of the jump."
        )


def _check_memory_kind(kind: str) -> None:
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"history_memory_kind={kind!r}: the device {device} has no such memory, only {', '.join(kinds)}; pass None."
        )


def _check_params(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = jax.tree_util.keystr(path) or "its root"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise ValueError(
                f"params has a leaf of type {type(leaf).__name__} at {place}, and only arrays can be forecast. Of an "
                "Equinox model take the arrays: eqx.filter(model, eqx.is_inexact_array)."
            ) from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params has a leaf of dtype {dtype} at {place}, and only real floating-point parameters can be "
                "forecast. Leave such leaves out with optax.masked or optax.partition."
            )


def _make_warning() -> Callable[[jax.Array], None]:
    """A function that warns the first time that parameters are misplaced, outside of `jit`."""
    has_warned = False

    def warn(is_misplaced: jax.Array) -> None:
        nonlocal has_warned
        if has_warned or isinstance(is_misplaced, jax.core.Tracer) or not is_misplaced:
            return
        has_warned = True
        warnings.warn(MISPLACED, stacklevel=4)

    return warn
