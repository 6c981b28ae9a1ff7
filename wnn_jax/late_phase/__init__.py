"""Late-phase weights: an ensemble of a few of a network's weights, averaged at the end."""

from wnn_jax.late_phase._members import RankOne as RankOne
from wnn_jax.late_phase._members import SplitParams as SplitParams
from wnn_jax.late_phase._members import average_members as average_members
from wnn_jax.late_phase._members import ensemble_predict as ensemble_predict
from wnn_jax.late_phase._members import module_mask as module_mask
from wnn_jax.late_phase._members import norm_mask as norm_mask
from wnn_jax.late_phase._members import rank_one_mask as rank_one_mask
from wnn_jax.late_phase._members import select_member as select_member
from wnn_jax.late_phase._members import split_members as split_members
from wnn_jax.late_phase._transform import LatePhaseState as LatePhaseState
from wnn_jax.late_phase._transform import late_phase as late_phase
from wnn_jax.late_phase._transform import migrate_state as migrate_state
