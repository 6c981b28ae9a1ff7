"""Drifts without weights: along the running mean of the optimizer's own displacement, as it is or orthogonalised."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_bool, check_float, check_int
from wnn_jax._nowcaster import Motion
from wnn_jax._orthogonal import orthogonalize
from wnn_jax._roles import ROLES
from wnn_jax._trees import norm, norms

_TINY = 1e-30
# Steps of memory at the very beginning, beside those between two visits.
_LEAST_MEMORY = 11

_SETTINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("memory", "the memory of the running mean, as a share of the steps so far", {"above": 0}),
    ("gain", "how far a jump goes, per step of memory", {"minimum": 0}),
    ("max_gain", "how far a jump goes at most, in multiples of the running mean", {"minimum": 0}),
    ("reach", "how far the jumps of one memory go at most, as a share of the weights", {"above": 0}),
)
_NUMBERS = (
    ("snapshot_every", "the number of optimizer steps between visits"),
    ("max_rows", "the rows of a block of a matrix, or None for whole matrices"),
)


@dataclasses.dataclass(frozen=True)
class Drift:
    r"""A small jump, often, along the way that the optimizer takes the weights in the long run.

    At every visit, `snapshot_every` steps :math:`K` after the one before, let :math:`d` be how far the optimizer alone
    has moved the weights since, and :math:`n` the steps since the first visit. Then

    .. math::
      M = \mathrm{memory} \cdot n + 11 + K, \qquad m \leftarrow m + \tfrac{K}{M} (d - m), \qquad
      w \leftarrow w + a \, O(m),

      a = \min\left(\mathrm{gain} \cdot M, \; \mathrm{max\_gain}, \;
      \mathrm{reach} \, \frac{\lVert w \rVert}{\lVert m \rVert} \frac{K}{M}\right)

    In steady motion the weights go :math:`1 + a` times as fast as the optimizer takes them, and what changes sign
    within the memory averages out. The memory grows with the training, so that nothing has to be chosen by its length.
    The last of the three bounds says that the jumps of one memory together go no further than a share `reach` of the
    norm of all tensors that move: where the learning rate is too high for more, they are shorter.

    :math:`O` is the identity for a slow drift. For a spectral drift it makes all singular values of a matrix alike and
    leaves its Frobenius norm as it is: a long mean has signal in the directions in which it is small, too. Embeddings,
    and all that is not a matrix, stay as they are. Matrices with more rows and columns than `max_rows` are cut into
    blocks, each of which is a matrix of its own, so that the cost of a weight does not grow with the matrix; shards on
    several devices are blocks as well (`docs/guides/scaling.md`).

    The best learning rate is that without, or a half or a quarter of it.

    Attributes:
      spectral: whether matrices are orthogonalised.
      memory: of the running mean, as a share of the steps so far, above 0.
      gain: how far a jump goes, per step of memory, in multiples of the running mean.
      max_gain: how far it goes at most, in multiples of the running mean.
      reach: how far the jumps of one memory go at most, as a share of the norm of all tensors that move, above 0.
      snapshot_every: steps between visits, where `nowcast` is given none.
      max_rows: of a block of a matrix, or `None` for whole matrices.

    Raises:
      ValueError: if a setting is out of its range.

    References:
      The growing memory and the growing weight of a slow mean are those of Pagliardini, Ablin, Grangier, `The AdEMAMix
      Optimizer <https://arxiv.org/abs/2409.03137>`_, ICLR 2025, there of gradients; the orthogonalisation is that of
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """

    spectral: bool = True
    memory: float = 0.1
    gain: float = 0.05
    max_gain: float = 10.0
    reach: float = 0.2
    snapshot_every: int = 10
    max_rows: int | None = 64

    roles: ClassVar[tuple[str, ...]] = ROLES

    def __post_init__(self) -> None:
        check_bool("spectral", self.spectral, "whether matrices are orthogonalised")
        for name, meaning, bounds in _SETTINGS:
            object.__setattr__(self, name, check_float(name, getattr(self, name), meaning, **bounds))
        for name, meaning in _NUMBERS:
            if name != "max_rows" or self.max_rows is not None:
                object.__setattr__(self, name, check_int(name, getattr(self, name), meaning, minimum=1))

    @property
    def num_means(self) -> int:
        """How many running means there are: one."""
        return 1

    def memories(self, step: Any, snapshot_every: Any) -> Sequence[Any]:
        """See `DriftNowcaster.memories`."""
        return (self.memory * step + (_LEAST_MEMORY + snapshot_every),)

    def __call__(self, motion: Motion, roles: Any) -> Any:
        """See `DriftNowcaster.__call__`."""
        (mean,) = motion.means
        direction = orthogonalize(mean, roles, max_rows=self.max_rows) if self.spectral else mean
        gain = self.gain_of(motion)
        return jax.tree.map(lambda leaf: gain.astype(leaf.dtype) * leaf, direction)

    def gain_of(self, motion: Motion) -> jax.Array:
        """How far a jump goes, in multiples of the first running mean: a scalar."""
        (memory, *_) = self.memories(motion.step, motion.snapshot_every)
        of_means, of_params = norms(motion.means[0]), norms(motion.params)
        path = norm(of_means) * memory / motion.snapshot_every
        # Of those that move: a mask, or what is frozen, says nothing about how far the others may go.
        reach = self.reach * norm(jnp.where(of_means > 0, of_params, 0)) / jnp.maximum(path, _TINY)
        return jnp.minimum(jnp.minimum(self.gain * memory, self.max_gain), reach)
