"""Weight nowcasting as an Optax transformation."""

import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from wnn_jax._checks import check_choice, check_float, check_float_dtype, check_int, is_injected, is_int
from wnn_jax._conditionals import any_member
from wnn_jax._history import History, HistoryFormat
from wnn_jax._nowcaster import Nowcaster
from wnn_jax._roles import RolesLike, resolve_roles
from wnn_jax._store import DEFAULT_NOWCASTER, load

Schedule = Callable[[Any], Any]


class NowcastState(NamedTuple):
    """State of `nowcast`. Its structure never changes after `init`.

    Attributes:
      count: int32, the steps taken.
      history: the snapshots of the current window, `context - 1` trees shaped, typed and sharded like the
        parameters, oldest first. Which of them are filled follows from `count`. With a `history_dtype` those after
        the first are differences from it.
      num_nowcasts: int32, the predictions applied.
      num_rejected: int32, the predictions not applied because they were not finite.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    history: History
    num_nowcasts: jax.Array
    num_rejected: jax.Array


def nowcast(
    nowcaster: str | os.PathLike[str] | Nowcaster = DEFAULT_NOWCASTER,
    *,
    snapshot_every: int,
    roles: RolesLike = None,
    horizon: int | Schedule | None = None,
    scale: float | Schedule = 1.0,
    start: int = 0,
    stop: int | None = None,
    history_dtype: Any = None,
    history_memory_kind: Literal["pinned_host"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the parameters, now and then, by a forecast of where they are going.

    Let :math:`w_t` be the parameters after step :math:`t`, and :math:`s` be `snapshot_every`. The window
    :math:`H = (w_s, w_{2s}, \dots, w_{cs})` of :math:`c` = `nowcaster.context` snapshots is complete at step
    :math:`cs`. At that step the update is

    .. math::
      u = w_{cs} + \mathrm{scale} \cdot (\mathrm{nowcaster}(H) - w_{cs}) - w_{cs-1}

    in place of the optimizer's own :math:`w_{cs} - w_{cs-1}`. With a `scale` of 1 the parameters become the forecast,
    and with 0 they stay those of plain training. At every other step the update passes through untouched. A new, empty
    window begins after each forecast, so that none ever spans a jump; one cycle is :math:`cs` steps. The states
    of the transformations before this one (the moments of Adam, say) are left alone.

    A forecast with a NaN or an infinity anywhere in it is not applied: the optimizer's own update is, and
    `NowcastState.num_rejected` counts it.

    Args:
      nowcaster: what makes the forecast: a name from `wnn_jax.available()`, the path of a file that
        `wnn_jax.save` wrote, or any `Nowcaster`.
      snapshot_every: steps between snapshots. The paper takes one snapshot per epoch.
      roles: which kind of operation each parameter belongs to: a tree of role names like the parameters, or a
        function from the parameters to such a tree. Default: `wnn_jax.default_roles`.
      horizon: how many snapshots beyond the last one to forecast, an int >= 1 or a schedule of the nowcast's
        index (0 for the first). Only for nowcasters that take one; `None` leaves the choice to the nowcaster.
      scale: how far to go along the jump, from where the optimizer's own step leads to the forecast: a float or a
        schedule of the nowcast's index. 0 is plain training exactly, 1 the forecast, more goes beyond it.
      start: the first step that may take a snapshot. Steps are numbered from 0, as by Optax's schedules.
        Snapshots stay on the multiples of `snapshot_every` whatever `start` is.
      stop: the first step that may no longer jump; `None` for never.
      history_dtype: a floating-point dtype in which to keep the snapshots after the first, as differences from it.
        With `bfloat16`, float32 parameters and 5 snapshots in a window the history takes 2.5 copies of the parameters
        instead of 4, and forecasts are as good (`benchmarks/history.txt`). A jump restores the snapshots, for its
        duration. Leaves that are as narrow already are kept as they are. `None`: all snapshots as the parameters are.
      history_memory_kind: `"pinned_host"`, to keep the snapshots in the memory of the host; they come to the device
        when one is written and when a forecast is made. Experimental. `None`: where the parameters are.

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

      - gradient accumulation goes inside: `chain(MultiSteps(...), nowcast(...))` counts micro-steps and jumps
        at most once per cycle of them; in `MultiSteps(chain(..., nowcast(...)))` `snapshot_every` counts full
        steps, and the forecast is computed, and thrown away, on micro-steps too;
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
    context = _check_nowcaster(nowcaster)
    snapshot_every = check_int(
        "snapshot_every",
        snapshot_every,
        "the number of optimizer steps between snapshots",
        minimum=1,
        or_injected=True,
    )
    start = check_int("start", start, "the first step that may take a snapshot", minimum=0, or_injected=True)
    if stop is not None:
        meaning = "the first step that may no longer jump, or None for never"
        stop = check_int("stop", stop, meaning, minimum=1, or_injected=True)
        if not is_injected(start) and not is_injected(stop) and stop <= start:
            raise ValueError(f"stop={stop} must be greater than start={start}; pass stop=None to never stop.")
    _check_takes_horizon(horizon, nowcaster)
    if horizon is not None and not callable(horizon):
        meaning = "the number of snapshots to forecast ahead, or a schedule of it"
        horizon = check_int("horizon", horizon, meaning, minimum=1, or_injected=True)
    if not callable(scale):
        scale = check_float("scale", scale, "how far to go along the jump, or a schedule of it", or_injected=True)
    if history_dtype is not None:
        meaning = "what to keep the snapshots after the first in, or None for that of the parameters"
        check_float_dtype("history_dtype", history_dtype, meaning)
    if history_memory_kind is not None:
        meaning = "the memory to keep snapshots in, or None for where the parameters are"
        check_choice("history_memory_kind", history_memory_kind, ("pinned_host",), meaning)
    history_format = HistoryFormat(context - 1, history_dtype, history_memory_kind)

    def init_fn(params: Any) -> NowcastState:
        _check_params(params)
        resolve_roles(roles, params)
        if history_memory_kind is not None:
            _check_memory_kind(history_memory_kind)
        return NowcastState(
            count=jnp.zeros([], jnp.int32),
            history=history_format.init(params),
            num_nowcasts=jnp.zeros([], jnp.int32),
            num_rejected=jnp.zeros([], jnp.int32),
        )

    def update_fn(updates: Any, state: NowcastState, params: Any = None, **extra_args: Any) -> tuple[Any, NowcastState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        params_roles = resolve_roles(roles, params)

        count = state.count
        is_snapshot = (count % snapshot_every == snapshot_every - 1) & (count >= start)
        if stop is not None:
            is_snapshot &= count < stop
        slot = (count // snapshot_every - start // snapshot_every) % context
        is_jump = is_snapshot & (slot == context - 1)
        is_recording = is_snapshot & ~is_jump

        # Two conditionals, each with the writing branch taken on True and returning no more than it writes: on an
        # ordinary step XLA then copies nothing. The parameters after the step are computed in the branches, because
        # one more operand of a conditional is one more buffer that every step fills.
        def record(history: History, params: Any, updates: Any) -> History:
            slot_now = jnp.where(is_recording, slot, -1)
            return history_format.write(history, slot_now, optax.apply_updates(params, updates))

        history = jax.lax.cond(
            any_member(is_recording), record, lambda history, *_: history, state.history, params, updates
        )

        index = state.num_nowcasts + state.num_rejected
        horizon_now = horizon(index) if callable(horizon) else horizon
        scale_now = scale(index) if callable(scale) else scale

        def jump(updates: Any, params: Any, history: History) -> tuple[Any, jax.Array]:
            window = (*history_format.read(history), optax.apply_updates(params, updates))
            prediction = nowcaster(window, params_roles, horizon_now)
            _check_prediction(prediction, params)
            if getattr(nowcaster, "moves_frozen", False):
                prediction = _hold_frozen(prediction, window)

            def replace(prediction: Any, params: Any) -> Any:
                after = optax.apply_updates(params, updates)
                return jax.tree.map(
                    lambda predicted, own, param, update: _jump(predicted, own, param, scale_now).astype(update.dtype),
                    prediction,
                    after,
                    params,
                    updates,
                )

            # Twice, once for the check, rather than once and kept: the one is reading, the other a copy of the model.
            accepted = is_jump & _all_finite(replace(prediction, jax.lax.optimization_barrier(params)))
            # A jump of no length counts, or schedules of the nowcast's index would stop at it, but changes no bit.
            is_replaced = accepted & (scale_now != 0)
            replacement = replace(prediction, params)
            return jax.tree.map(lambda new, old: jnp.where(is_replaced, new, old), replacement, updates), accepted

        updates, accepted = jax.lax.cond(
            any_member(is_jump),
            jump,
            lambda updates, *_: (updates, jnp.zeros_like(is_jump)),
            updates,
            params,
            history,
        )
        return updates, NowcastState(
            count=cast(jax.Array, optax.safe_increment(count)),
            history=history,
            num_nowcasts=state.num_nowcasts + accepted.astype(jnp.int32),
            num_rejected=state.num_rejected + (is_jump & ~accepted).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def _jump(predicted: jax.Array, after: jax.Array, param: jax.Array, scale: Any) -> jax.Array:
    """The update that leads from `param` to `after + scale * (predicted - after)`."""
    # In at least fp32: what bf16 loses in a difference would move the parameters off the prediction.
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    param = param.astype(dtype)
    # Of this form, because at scale 1 nothing but the difference from the prediction is left, rounded once.
    return (1 - scale) * (after.astype(dtype) - param) + scale * (predicted.astype(dtype) - param)


def _hold_frozen(prediction: Any, window: History) -> Any:
    """The prediction, with the weights that did not change within the window kept as they are."""

    def hold(predicted: jax.Array, *leaf_history: jax.Array) -> jax.Array:
        last = leaf_history[-1]
        is_frozen = jnp.ones_like(last, dtype=bool)
        for snapshot in leaf_history[:-1]:
            is_frozen &= snapshot == last
        return jnp.where(is_frozen, last, predicted)

    return jax.tree.map(hold, prediction, *window)


def _all_finite(tree: Any) -> jax.Array:
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def _check_nowcaster(nowcaster: Any) -> int:
    """The context of a nowcaster."""
    context: Any = getattr(nowcaster, "context", None)
    if isinstance(nowcaster, type) or not callable(nowcaster) or not is_int(context) or context < 1:
        raise ValueError(
            f"nowcaster={nowcaster!r} is not a nowcaster: it must be callable and have a positive int `context`. Pass "
            "a name from wnn_jax.available(), the path of a saved nowcaster, or make one with wnn_jax.leafwise."
        )
    return int(context)


def _check_takes_horizon(horizon: Any, nowcaster: Nowcaster) -> None:
    if horizon is not None and not getattr(nowcaster, "takes_horizon", True):
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
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params has a leaf of dtype {dtype} at {jax.tree_util.keystr(path) or 'its root'}, and only real "
                "floating-point parameters can be forecast. Leave such leaves out with optax.masked or optax.partition."
            )


def _check_prediction(prediction: Any, params: Any) -> None:
    def shapes(tree: Any) -> list[tuple[int, ...]]:
        return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    # Structures and leaves, not trees: a node of a user's class need not define equality.
    if jax.tree.structure(prediction) != jax.tree.structure(params) or shapes(prediction) != shapes(params):
        raise ValueError(
            f"the nowcaster returned the shapes {jax.tree.map(jnp.shape, prediction)} for parameters of the shapes "
            f"{jax.tree.map(jnp.shape, params)}; it must return a tree like the parameters."
        )
