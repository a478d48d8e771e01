"""Training losses: pure functions of networks and tensors that know nothing of a trainer."""

from rcm.losses.consistency import consistency_loss
from rcm.losses.flow_matching import flow_matching_loss
from rcm.losses.loss import Loss
from rcm.losses.score import score_loss

__all__ = ["Loss", "consistency_loss", "flow_matching_loss", "score_loss"]
