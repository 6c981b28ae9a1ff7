"""The drift: small jumps along the running mean of the optimizer's own displacement."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from wnn_jax._checks import check_bool, check_float, check_int
from wnn_jax._guards import Jump, Outcome, Visit, no_jump, relative_size
from wnn_jax._orthogonal import orthogonalize
from wnn_jax._roles import ROLES
from wnn_jax._trees import (
    MemoryKind,
    add,
    all_finite,
    apply_updates,
    choose,
    difference,
    fetch,
    norm,
    norms,
    put_away,
    wide_dtype,
    write_if,
)

# In steps: the first mean has this memory, plus the steps between two visits.
_LEAST_MEMORY = 11


@dataclasses.dataclass(frozen=True)
class Drift:
    r"""Small and frequent jumps in the direction in which the optimizer moves the weights in the long run.

    `nowcast` visits the weights every :math:`K` = `snapshot_every` steps. Let :math:`d` be how far the optimizer alone
    moved them since the last visit, and :math:`n` the steps since the first visit. At every visit

    .. math::
      M = \mathrm{memory} \cdot n + 11 + K, \qquad m \leftarrow m + \tfrac{K}{M} (d - m), \qquad
      w \leftarrow w + a \, O(m),

      a = \min\left(\mathrm{gain} \cdot M, \; \mathrm{max\_gain}, \;
      \mathrm{reach} \, \frac{\lVert w \rVert}{\lVert m \rVert} \frac{K}{M}\right)

    In steady motion, the weights move :math:`1 + a` times as fast as the optimizer alone would move them. What changes
    its sign within the memory averages out. The memory grows with the training run, so you need not choose it. The
    third bound limits the jumps of one memory to a share `reach` of the norm of all tensors that move. It shortens the
    jumps when the learning rate is too high for longer ones.

    For a slow drift, :math:`O` is the identity. For a spectral drift, it makes all singular values of a matrix nearly
    equal and keeps its Frobenius norm, because a long mean has signal in its small directions, too. Embeddings and
    other tensors are left alone. Matrices with more rows and columns than `max_rows` are cut into blocks, so that a
    weight's cost does not grow with its matrix. Each device's shard is a block, too (`docs/guides/scaling.md`).

    Attributes:
      spectral: whether matrices are orthogonalised.
      memory: of the running mean, as a share of the steps so far, above 0.
      gain: how far a jump goes, per step of memory, in multiples of the running mean.
      max_gain: how far a jump goes at most, in multiples of the running mean.
      reach: how far the jumps of one memory go at most, as a share of the norm of all tensors that move, above 0.
      snapshot_every: steps between visits, unless `nowcast` is given another number.
      max_rows: rows of a block of a matrix, or `None` for whole matrices.

    Raises:
      ValueError: if a setting is out of its range.

    References:
      Pagliardini, Ablin, Grangier, `The AdEMAMix Optimizer <https://arxiv.org/abs/2409.03137>`_, ICLR 2025, for the
      growing memory and gain of a slow mean, there of gradients. Jordan et al., `Muon
      <https://kellerjordan.github.io/posts/muon/>`_, 2024, for the orthogonalisation.
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
        share, multiples = "as a share of", "in multiples of the running mean"
        checked: dict[str, Any] = {
            "memory": check_float("memory", self.memory, f"the mean's memory, {share} the steps so far", above=0),
            "gain": check_float("gain", self.gain, f"a jump's length per step of memory, {multiples}", minimum=0),
            "max_gain": check_float("max_gain", self.max_gain, f"a jump's greatest length, {multiples}", minimum=0),
            "reach": check_float("reach", self.reach, f"how far one memory's jumps go, {share} the weights", above=0),
            "snapshot_every": check_int("snapshot_every", self.snapshot_every, "the steps between visits", minimum=1),
        }
        if self.max_rows is not None:
            meaning = "the rows of a block of a matrix, or None for whole matrices"
            checked["max_rows"] = check_int("max_rows", self.max_rows, meaning, minimum=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def memory_after(self, num_steps: Any, snapshot_every: Any) -> Any:
        """Return the memory of the running mean in steps, at the visit this many steps after the first."""
        return self.memory * num_steps + (_LEAST_MEMORY + snapshot_every)

    def jump(self, mean: Any, params: Any, roles: Any, *, memory: Any, snapshot_every: Any) -> tuple[Any, jax.Array]:
        """Return the jump, and its norm relative to the norm of the parameters that move.

        The parameters are after the optimizer's step. The mean is in at least float32, and the memory in steps.
        """
        of_mean, of_params = norms(mean), norms(params)
        # Tensors that do not move, such as masks, say nothing about how far the others may go.
        of_params = jnp.where(of_mean > 0, of_params, 0)
        path = norm(of_mean) * memory / snapshot_every
        reach = self.reach * norm(of_params) / jnp.maximum(path, 1e-30)
        gain = jnp.minimum(jnp.minimum(self.gain * memory, self.max_gain), reach)
        direction = orthogonalize(mean, roles, max_rows=self.max_rows) if self.spectral else mean
        moves = jax.tree.map(lambda leaf: gain.astype(leaf.dtype) * leaf, direction)
        return moves, gain * relative_size(of_mean, of_params)


class DriftHistory(NamedTuple):
    """The history of a drift: two trees like the parameters."""

    anchor: Any  # The parameters after the last visit.
    mean: Any  # The running mean of how far the optimizer moves them between two visits.


@dataclasses.dataclass(frozen=True)
class DriftRule:
    """Keep a drift's history, in this dtype and kind of memory, and move the parameters on at every visit."""

    drift: Drift
    dtype: Any = None
    memory_kind: MemoryKind = None

    def init(self, params: Any) -> DriftHistory:
        """Return an empty history, each array in a buffer of its own so that the state can be donated."""
        anchor = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=jnp.result_type(param)), params)
        mean = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=self.dtype or wide_dtype(param)), params)
        return put_away(DriftHistory(anchor, mean), self.memory_kind)

    def update(self, visit: Visit, updates: Any, history: DriftHistory, params: Any, roles: Any) -> Outcome:
        """Continue the drift if a visit is due, and change nothing otherwise."""
        # The first visit only records where the parameters are.
        is_jump = visit.is_due & (visit.num_snapshots > 0)

        @jax.named_scope("visit")
        def move_on(updates: Any, history: DriftHistory, params: Any) -> tuple[Any, DriftHistory, Jump]:
            anchor, old = fetch(history, self.memory_kind)
            memory = self.drift.memory_after(visit.num_snapshots * visit.snapshot_every, visit.snapshot_every)
            after = apply_updates(params, updates)

            def continue_mean(old: jax.Array, after: jax.Array, anchor: jax.Array) -> jax.Array:
                mean = old.astype(wide_dtype(old))
                mean = mean + visit.snapshot_every / memory * (difference(after, anchor) - mean)
                return jnp.where(visit.is_due, jnp.where(is_jump, mean, 0).astype(old.dtype), old)

            kept = jax.tree.map(continue_mean, old, after, anchor)
            mean = jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf)), kept)
            with jax.named_scope("forecast"):
                moves, size = self.drift.jump(mean, after, roles, memory=memory, snapshot_every=visit.snapshot_every)
            jumped = jax.tree.map(lambda update, move: add(update, visit.scale * move), updates, moves)
            is_accepted = is_jump & all_finite(apply_updates(params, jumped))
            size = (jnp.abs(visit.scale) * size).astype(jnp.float32)
            jump = choose(is_accepted, Jump(is_accepted, jnp.zeros([], jnp.int32), size), no_jump())
            # A jump of no length must not change a bit.
            new_updates = choose(is_accepted & (visit.scale != 0), jumped, updates)
            # The anchor is where the jump leads, so that the jump is no part of the next displacement.
            anchor = choose(visit.is_due, apply_updates(params, new_updates), anchor)
            return new_updates, put_away(DriftHistory(anchor, kept), self.memory_kind), jump

        updates, history, jump = write_if(
            visit.is_due,
            move_on,
            lambda updates, history, _: (updates, history, no_jump()),
            updates,
            DriftHistory(*history),  # A checkpoint may have made a plain tuple of it.
            params,
        )
        # After a jump that is not finite, the history begins again.
        num_snapshots = jnp.where(is_jump & ~jump.is_accepted, 0, visit.num_snapshots + 1)
        return Outcome(updates, history, num_snapshots, is_jump, jump)
