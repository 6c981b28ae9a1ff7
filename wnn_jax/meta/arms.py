"""The arms of a comparison: what each of them does to the same training run."""

import dataclasses
import re
from pathlib import Path

import optax

import wnn_jax
from wnn_jax.meta.errors import UsageError

ARM_HELP = (
    "Arms to compare: `none`, a name from wnn_jax.available(), or the path of a saved nowcaster. `@SCALE` behind it "
    "scales its jumps, `~HORIZON` forecasts so many snapshots ahead (`~40-1`: from 40 at first to 1 at last), and "
    "`+cosine` decays the learning rate to zero: `none+cosine`, `linear@0.5`, `wnn-plus~40-1`, `wnn.npz@0.5+cosine`. "
    "The first arm is the reference of the speed-ups."
)

_ARM = re.compile(r"(?P<nowcaster>[^@~]+?)(@(?P<scale>[^@~+]+))?(~(?P<horizon>[^@~+]+))?(?P<cosine>\+cosine)?")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      label: its name in tables, plots and file names.
      nowcaster: what forecasts its weights, or `None`.
      scale: multiplies its jumps.
      horizon: the horizons of its first and its last nowcast, in snapshots, or `None` for the nowcaster's own.
      cosine: whether the learning rate decays to zero over the run.
    """

    label: str
    nowcaster: wnn_jax.Nowcaster | None
    scale: float
    horizon: tuple[int, int] | None
    cosine: bool

    def optimizer(self, *, learning_rate: float, num_steps: int, snapshot_every: int) -> optax.GradientTransformation:
        """Adam, followed by this arm's nowcast."""
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps) if self.cosine else learning_rate
        adam = optax.adam(schedule)
        if self.nowcaster is None:
            return adam
        horizon = None
        if self.horizon is not None:
            num_nowcasts = max(num_steps // (self.nowcaster.context * snapshot_every), 1)
            horizon = wnn_jax.decaying_horizon(num_nowcasts, first=self.horizon[0], last=self.horizon[1])
        nowcast = wnn_jax.nowcast(self.nowcaster, snapshot_every=snapshot_every, scale=self.scale, horizon=horizon)
        return optax.chain(adam, nowcast)


def parse_arms(specifications: tuple[str, ...]) -> tuple[Arm, ...]:
    """The arms that a command line names.

    Raises:
      UsageError: if one is not understood, its nowcaster cannot be loaded, or two are the same.
    """
    arms = tuple(_parse_arm(specification) for specification in specifications)
    labels = [arm.label for arm in arms]
    if not arms or len(set(labels)) < len(labels):
        raise UsageError(f"--nowcaster {' '.join(specifications)} must name at least one arm, and none twice.")
    return arms


def _parse_arm(specification: str) -> Arm:
    match = _ARM.fullmatch(specification)
    try:
        if match is None:
            raise ValueError("it is not of the form NAME-or-FILE[@SCALE][~HORIZON][+cosine]")
        name = match["nowcaster"]
        nowcaster = None if name == "none" else wnn_jax.load(name)
        scale = float(match["scale"] or 1.0)
        horizon = None
        if match["horizon"]:
            first, _, last = match["horizon"].partition("-")
            horizon = int(first), int(last or first)
        if nowcaster is None and match["scale"]:
            raise ValueError("`none` has no jumps to scale")
        if horizon and (nowcaster is None or not getattr(nowcaster, "takes_horizon", True)):
            raise ValueError(f"`{name}` takes no horizon")
        if horizon and min(horizon) < 1:
            raise ValueError("a horizon is at least 1 snapshot")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--nowcaster {specification!r} cannot be used: {error}") from error
    label = specification.replace(name, Path(name).stem if nowcaster else name, 1)
    return Arm(label, nowcaster, scale, horizon, cosine=match["cosine"] is not None)
