"""The arms of a comparison: what each of them does to the same training run."""

import dataclasses
import re
from pathlib import Path

import optax

import wnn_jax
from experiments.harness.errors import UsageError

ARM_HELP = (
    "Arms to compare: `none`, a name from wnn_jax.available(), or the path of a saved nowcaster. `@SCALE` behind it "
    "scales its jumps, `+cosine` decays the learning rate to zero: `none+cosine`, `linear@0.5`, `wnn.npz@0.5+cosine`. "
    "The first arm is the reference of the speed-ups."
)

_ARM = re.compile(r"(?P<nowcaster>[^@]+?)(@(?P<scale>[^@+]+))?(?P<cosine>\+cosine)?")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      label: its name in tables, plots and file names.
      nowcaster: what forecasts its weights, or `None`.
      scale: multiplies its jumps.
      cosine: whether the learning rate decays to zero over the run.
    """

    label: str
    nowcaster: wnn_jax.Nowcaster | None
    scale: float
    cosine: bool

    def optimizer(self, *, learning_rate: float, num_steps: int, snapshot_every: int) -> optax.GradientTransformation:
        """Adam, followed by this arm's nowcast."""
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps) if self.cosine else learning_rate
        adam = optax.adam(schedule)
        if self.nowcaster is None:
            return adam
        return optax.chain(adam, wnn_jax.nowcast(self.nowcaster, snapshot_every=snapshot_every, scale=self.scale))


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
            raise ValueError("it is not of the form NAME-or-FILE[@SCALE][+cosine]")
        name = match["nowcaster"]
        nowcaster = None if name == "none" else wnn_jax.load(name)
        scale = float(match["scale"] or 1.0)
        if nowcaster is None and match["scale"]:
            raise ValueError("`none` has no jumps to scale")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--nowcaster {specification!r} cannot be used: {error}") from error
    label = specification.replace(name, Path(name).stem if nowcaster else name, 1)
    return Arm(label, nowcaster, scale, cosine=match["cosine"] is not None)
