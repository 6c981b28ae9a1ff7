"""Weight nowcasting as an Optax transformation."""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_choice, check_float, check_float_dtype, check_int, is_injected, is_int
from wnn_jax._drift import Drift, DriftHistory, DriftRule
from wnn_jax._guards import MAX_COUNT, Counters, Landmark, Visit, check_params, make_warning, position_of
from wnn_jax._roles import RolesLike, resolve_roles
from wnn_jax._store import DEFAULT_NOWCASTER, load
from wnn_jax._window import Nowcaster, WindowHistory, WindowRule, clip_horizon

Schedule = Callable[[Any], Any]


class NowcastState(NamedTuple):
    """The state that `nowcast` keeps between steps. Its structure never changes after `init`.

    Attributes:
      count: int32, how many steps have been taken. It stops at 2147483647.
      history: where the parameters have been, as trees of their shapes and shardings. A drift keeps two trees, `anchor`
        and `mean`. A window keeps its `snapshots`.
      num_snapshots: int32, how often the history was visited since it began.
      last_snapshot: int32, the step of the last visit, counted from 0.
      snapshot_every: int32, the steps between two visits to this history.
      landmark: where the last update led, from which `nowcast` tells whether anything else moved the parameters.
      counters: what `nowcast` has done so far. Read them with `wnn_jax.metrics`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    history: WindowHistory | DriftHistory
    num_snapshots: jax.Array
    last_snapshot: jax.Array
    snapshot_every: jax.Array
    landmark: Landmark
    counters: Counters

    @property
    def num_nowcasts(self) -> jax.Array:
        """How many jumps were made, int32."""
        return self.counters.num_nowcasts

    @property
    def num_rejected(self) -> jax.Array:
        """How many jumps were not made because they were not finite, int32."""
        return self.counters.num_rejected


def nowcast(
    nowcaster: str | os.PathLike[str] | Nowcaster | Drift = DEFAULT_NOWCASTER,
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
    r"""Move the parameters ahead from time to time, to where they are going.

    Put it last in a chain. Without arguments, it follows the `Drift` of the parameters: every 10 steps, it moves them a
    little further in the direction in which the optimizer has moved them in the long run. Tune only the learning rate:
    try your best value without `nowcast`, half of it, and a quarter of it.

    There are two kinds of nowcasters. Let :math:`w_t` be the parameters after step :math:`t`, and :math:`s` be
    `snapshot_every`.

    - A *drift* makes a small jump every :math:`s` steps. It keeps a running mean of how far the optimizer alone moves
      the parameters in :math:`s` steps, and moves them further along this mean.
    - A *window* takes a snapshot every :math:`s` steps until it has :math:`c` = `nowcaster.context` of them,
      :math:`H = (w_s, w_{2s}, \dots, w_{cs})`. Then the parameters jump from :math:`w_{cs}` to
      :math:`w_{cs} + \mathrm{scale} \cdot (\mathrm{nowcaster}(H) - w_{cs})`, and a new, empty window begins.

    On all other steps, the optimizer's update passes through unchanged. With a `scale` of 0, it always does. Other
    transformations keep their states, such as Adam's moments.

    Every jump is safe, and `wnn_jax.metrics` counts what goes wrong.

    - *Jumps are bounded.* In a window, a weight moves by at most the horizon (by default 5) times the difference of its
      largest and smallest snapshots. A weight that did not move stays. With a drift, a tensor moves by at most
      `Drift.max_gain` times the norm of its mean. `scale` multiplies these bounds.
    - *Jumps are finite.* If the forecast of a weight that moved, or a new parameter, is NaN or infinite, no weight
      jumps.
    - *Histories fit.* A history recorded with another `snapshot_every` or `start` begins again. A history of another
      kind is a `ValueError`.
    - *Nothing else moves the parameters.* Otherwise the history begins again, and outside of `jit` there is a warning.
      The cause may be a transformation after this one, an edit of the parameters, or a checkpoint restored without this
      state. A few small tensors are checked, with a tolerance of a quarter of the last update.
    - *Counters do not overflow.* After 2147483647 steps there are no more jumps.

    Args:
      nowcaster: a name from `wnn_jax.available()`, the path of a file that `wnn_jax.save` wrote, a `Nowcaster`, or a
        `wnn_jax.nowcasters.Drift`.
      snapshot_every: steps between visits to the history. A drift has its own default, 10. For a window, give the steps
        of an epoch, as in the paper, or a thirtieth of the training run.
      num_steps: length of the training run in steps, if known. A training run too short for any jump is then an error.
      average: decay per step of a running mean of the parameters. A window then takes its snapshots from the mean, and
        the parameters jump as far as the mean. Try `1 - 1 / snapshot_every`. It costs one more copy of the parameters
        and a pass over it at every step. `None`: snapshots of the parameters.
      roles: the kind of operation that each parameter belongs to: a tree of role names like the parameters, or a
        function from the parameters to such a tree. Default: `wnn_jax.default_roles`.
      horizon: how many snapshots ahead to forecast, an int >= 1 or a schedule of the jump's index (0 for the first).
        Only for nowcasters that take one. `None`: the nowcaster's own.
      scale: how far to go along a jump: 0 is plain training, 1 the whole jump, and more goes beyond it. A float or a
        schedule of the jump's index.
      start: the first step that may take a snapshot, counted from 0. Snapshots stay on multiples of `snapshot_every`.
      stop: the first step that may no longer jump, or `None` for never.
      history_dtype: a floating-point dtype for the history: the mean of a drift, or a window's snapshots after the
        first, as differences from it. With `bfloat16` and float32 parameters, a drift takes 1.5 copies of the
        parameters instead of 2, and a window of 5 snapshots 2.5 instead of 4. Forecasts are as good
        (`benchmarks/history.txt`). `None`: snapshots as the parameters are, and means in at least float32.
      history_memory_kind: `"pinned_host"` keeps the history in the host's memory. Experimental. `None`: in the memory
        of the parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `NowcastState`. Its `update` needs `params` and ignores extra
      arguments.

    Raises:
      ValueError: if an argument is out of its range or does not fit the nowcaster; at `init`, if a parameter is no real
        floating-point array, `roles` does not match, or the device has no memory of that kind; at `update`, if `params`
        is missing or the state is of another kind.

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
      Put `nowcast` last in a chain: it replaces the whole step. In particular

      - accumulate gradients inside: `chain(MultiSteps(...), nowcast(...))` counts micro-steps.
        `MultiSteps(chain(..., nowcast(...)))` counts full steps, but wastes forecasts on micro-steps;
      - under `optax.masked` and `optax.partition`, `nowcast` sees only some of the parameters: give `roles` as a
        function, or leave it out;
      - under `optax.inject_hyperparams`, name a callable `nowcaster` or `roles` in `static_args`;
      - `init` gives the history the shardings of the parameters; under `jit` that takes explicit mesh axes, or
        `out_shardings` made with `optax.tree.map_params`;
      - under `jax.vmap` over seeds, the forecast runs only when some member jumps.
    """
    if isinstance(nowcaster, (str, os.PathLike)):
        nowcaster = load(nowcaster)
    _check_nowcaster(nowcaster, snapshot_every, horizon, average)
    if snapshot_every is None:
        snapshot_every = cast(Drift, nowcaster).snapshot_every
    check = functools.partial(check_int, or_injected=True)
    snapshot_every = check("snapshot_every", snapshot_every, "the optimizer steps between snapshots", minimum=1)
    start = check("start", start, "the first step that may take a snapshot", minimum=0)
    if stop is not None:
        stop = check("stop", stop, "the first step that may no longer jump, or None for never", minimum=1)
        if not is_injected(start) and not is_injected(stop) and stop <= start:
            raise ValueError(f"stop={stop} must be greater than start={start}; pass stop=None to never stop.")
    if num_steps is not None:
        num_steps = check_int("num_steps", num_steps, "the length of the training run, if it is known", minimum=1)
        _check_jumps(nowcaster, num_steps, snapshot_every, start, stop)
    if horizon is not None and not callable(horizon):
        horizon = check("horizon", horizon, "the snapshots to forecast ahead, or a schedule of them", minimum=1)
    if not callable(scale):
        scale = check_float("scale", scale, "how far to go along the jump, or a schedule of it", or_injected=True)
    if history_dtype is not None:
        check_float_dtype("history_dtype", history_dtype, "the dtype of the history, or None for the default")
    if history_memory_kind is not None:
        meaning = "the memory to keep the history in, or None for where the parameters are"
        check_choice("history_memory_kind", history_memory_kind, ("pinned_host",), meaning)
    if average is not None:
        meaning = "the decay per step of the running mean that a window has snapshots of, or None for the parameters"
        average = check_float("average", average, meaning, minimum=0, below=1, or_injected=True)
    storage = history_dtype, history_memory_kind
    rule = DriftRule(nowcaster, *storage) if isinstance(nowcaster, Drift) else WindowRule(nowcaster, average, *storage)
    warn_of_misplaced = make_warning()

    def init_fn(params: Any) -> NowcastState:
        check_params(params)
        resolved = resolve_roles(roles, params)
        if (check_nowcaster_params := getattr(nowcaster, "check_params", None)) is not None:
            check_nowcaster_params(params, resolved)
        kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
        if history_memory_kind is not None and history_memory_kind not in kinds:
            raise ValueError(
                f"history_memory_kind={history_memory_kind!r}: the device {jax.devices()[0]} has no such memory, only "
                f"{', '.join(kinds)}; pass None."
            )
        zeros = (jnp.zeros([], jnp.int32) for _ in range(4))  # Each in a buffer of its own, to be donated.
        history, landmark = rule.init(params), Landmark.unknown(params)
        return NowcastState(next(zeros), history, *zeros, landmark=landmark, counters=Counters.zero())

    @jax.named_scope("nowcast")
    def update_fn(updates: Any, state: NowcastState, params: Any = None, **extra_args: Any) -> tuple[Any, NowcastState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        _check_history(state.history, jax.eval_shape(rule.init, params), nowcaster)
        # A checkpoint may have turned these into plain tuples.
        landmark, counters = Landmark(*state.landmark), Counters(*state.counters)
        count, position = state.count, position_of(params)
        is_misplaced = landmark.is_missed(position)
        warn_of_misplaced(is_misplaced)
        num_snapshots = jnp.where(is_misplaced, 0, state.num_snapshots)
        is_due = (count % snapshot_every == snapshot_every - 1) & (count >= start) & (count < MAX_COUNT)
        if stop is not None:
            is_due &= count < stop
        # A history that was visited at other steps begins again.
        is_continued = (state.snapshot_every == snapshot_every) & (count - state.last_snapshot == snapshot_every)
        index = counters.num_nowcasts + counters.num_rejected
        visit = Visit(
            is_first=(count == 0) | is_misplaced,
            is_due=is_due,
            num_snapshots=jnp.where(is_continued, num_snapshots, 0),
            snapshot_every=snapshot_every,
            horizon=clip_horizon(horizon(index)) if callable(horizon) else horizon,
            scale=scale(index) if callable(scale) else scale,
        )
        outcome = rule.update(visit, updates, cast(Any, state.history), params, resolve_roles(roles, params))
        is_restart = (state.num_snapshots > 0) & (is_misplaced | (is_due & ~is_continued))
        return outcome.updates, NowcastState(
            count=cast(jax.Array, optax.safe_increment(count)),
            history=outcome.history,
            num_snapshots=jnp.where(is_due, outcome.num_snapshots, num_snapshots),
            last_snapshot=jnp.where(is_due, count, state.last_snapshot),
            snapshot_every=jnp.where(is_due, jnp.asarray(snapshot_every, jnp.int32), state.snapshot_every),
            landmark=Landmark.after(params, outcome.updates, position),
            counters=counters.after(count, outcome, is_restart=is_restart, is_misplaced=is_misplaced),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Return what the nowcasts in an optimizer have done so far, as scalars for a logger.

    Args:
      opt_state: the state of an optimizer with one or more nowcasts in it, however deep. May be traced.

    Returns:
      `num_nowcasts`: jumps made. `num_rejected`: jumps not made because they were not finite. `num_cut`: weights that
      the bound held back. `num_restarts`: histories that began again early. `num_misplaced`: steps at which the
      parameters were not where the last update led. `steps_since_nowcast`: steps after the last jump, or all steps.
      `last_size`: the norm of the last jump relative to the norm of the parameters that move. With several nowcasts,
      the place of the state precedes each name, as in `inner_states/decoder/inner_state/1/num_nowcasts`.

    Raises:
      ValueError: if there is no nowcast in it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import wnn_jax
      >>> tx = optax.chain(optax.adam(1e-3), wnn_jax.nowcast())
      >>> int(wnn_jax.metrics(tx.init(jnp.zeros(3)))["num_nowcasts"])
      0
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda node: isinstance(node, NowcastState))
    states = [(path, leaf) for path, leaf in leaves if isinstance(leaf, NowcastState)]
    if not states:
        raise ValueError(
            f"opt_state of the type {type(opt_state).__name__} has no state of wnn_jax.nowcast in it. Pass the state "
            "of an optimizer with a nowcast, as `init` and `update` return it."
        )
    named: dict[str, jax.Array] = {}
    for path, state in states:
        place = "" if len(states) == 1 else f"{jax.tree_util.keystr(path, simple=True, separator='/')}/"
        values = state.counters._asdict()
        has_jumped = state.num_nowcasts > 0
        values["steps_since_nowcast"] = state.count - has_jumped * (values.pop("last_nowcast") + 1)
        named |= {f"{place}{name}": value for name, value in values.items()}
    return named


def _check_nowcaster(nowcaster: Any, snapshot_every: Any, horizon: Any, average: Any) -> None:
    """Raise a `ValueError` unless it is a nowcaster, and the other arguments fit it."""
    name = type(nowcaster).__name__.lstrip("_")
    if isinstance(nowcaster, Drift):
        if horizon is not None:
            raise ValueError(
                f"horizon={horizon!r} was given, but {name} moves the parameters along a drift and has no horizon. "
                "Leave horizon out; `scale` changes the length of the jumps."
            )
        if average is not None:
            raise ValueError(
                f"average={average!r} was given, but {name} goes by a drift, which is an average itself. Leave average "
                "out, or pass a nowcaster that forecasts from a window of snapshots."
            )
        return
    context: Any = getattr(nowcaster, "context", None)
    if isinstance(nowcaster, type) or not callable(nowcaster) or not is_int(context) or context < 1:
        raise ValueError(
            f"nowcaster={nowcaster!r} is not a nowcaster: it must be a wnn_jax.nowcasters.Drift, or be callable and "
            "have a positive int `context`. Pass a name from wnn_jax.available(), the path of a saved nowcaster, or "
            "make one with wnn_jax.leafwise."
        )
    if snapshot_every is None and getattr(nowcaster, "snapshot_every", None) is None:
        raise ValueError(
            f"snapshot_every=None: {name} forecasts from a window of snapshots and has no spacing of its own. Give the "
            "number of steps between two snapshots: the steps of one epoch, or a thirtieth of the training "
            "(snapshot_every=max(num_steps // 30, 1))."
        )
    if horizon is not None and not getattr(nowcaster, "takes_horizon", True):
        raise ValueError(
            f"horizon={horizon!r} was given, but {name} takes none: its horizon is fixed by its training. Leave "
            "horizon out; `scale` changes the length of the jump."
        )


def _check_jumps(nowcaster: Nowcaster | Drift, num_steps: int, snapshot_every: Any, start: Any, stop: Any) -> None:
    """Raise a `ValueError` if a training run has no jump."""
    if any(is_injected(value) for value in (snapshot_every, start, stop)):
        return
    first_jump_after = 2 if isinstance(nowcaster, Drift) else nowcaster.context
    end = num_steps if stop is None else min(stop, num_steps)
    if (start // snapshot_every + first_jump_after) * snapshot_every <= end:
        return
    # Any spacing up to this has a jump, wherever between two multiples of it `start` is.
    largest = (end - start) // first_jump_after
    remedy = f"Pass a spacing of at most {largest}, or train for longer." if largest > 0 else "Train for longer."
    raise ValueError(
        f"snapshot_every={snapshot_every} is too large for num_steps={num_steps}: the first jump comes with snapshot "
        f"number {first_jump_after}, and there is none in the steps from {start} to {end}. {remedy}"
    )


def _check_history(history: Any, expected: WindowHistory | DriftHistory, nowcaster: Any) -> None:
    """Raise a `ValueError` unless a history is of the kind and the dtypes that `init` would make."""
    remedy = "Go on with the nowcaster and the history_dtype that it was made with, or begin a new one with `init`."
    # As plain tuples: a checkpoint may have turned named tuples into these.
    if jax.tree.structure(tuple(history)) != jax.tree.structure(tuple(expected)):
        raise ValueError(
            f"the history in the state is {_kind(history)}, and {type(nowcaster).__name__.lstrip('_')} needs "
            f"{_kind(expected)}, of trees like the parameters. {remedy}"
        )
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), actual in zip(paths, jax.tree.leaves(history), strict=True):
        if actual.dtype != leaf.dtype:
            place = f"history{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place} in the state is of dtype {actual.dtype}, and not {leaf.dtype}. {remedy}")


def _kind(history: Any) -> str:
    if not isinstance(history, WindowHistory):
        return "a drift" if isinstance(history, DriftHistory) else f"a {type(history).__name__}"
    return f"a window of {len(history.snapshots)} snapshots{' of a running mean' * (history.mean is not None)}"
