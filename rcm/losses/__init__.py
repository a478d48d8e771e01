"""Training losses: pure functions of networks and tensors that know nothing of a trainer."""

from rcm.derivatives import central_difference, exact_jvp, one_pass_jvp
from rcm.losses.consistency import consistency_loss
from rcm.losses.discrete_consistency import discrete_consistency_loss
from rcm.losses.flow_matching import flow_matching_loss
from rcm.losses.lagrangian import lagrangian_flow_map_loss
from rcm.losses.lcm import lcm_loss
from rcm.losses.loss import Loss
from rcm.losses.mean_flow import mean_flow_loss
from rcm.losses.score import score_loss
from rcm.losses.terminal_velocity import terminal_velocity_loss

__all__ = [
    "Loss",
    "central_difference",
    "consistency_loss",
    "discrete_consistency_loss",
    "exact_jvp",
    "flow_matching_loss",
    "lagrangian_flow_map_loss",
    "lcm_loss",
    "mean_flow_loss",
    "one_pass_jvp",
    "score_loss",
    "terminal_velocity_loss",
]
