"""Whether real samples are enough to be scored, which is known before anything is trained."""

from __future__ import annotations

from rcm.data.dataset import Dataset, evenly_spaced, halves
from rcm.errors import RunError
from rcm.evaluation.evaluator import DIVERSITY_SAMPLES
from rcm.evaluation.manifold import NEIGHBOURS


def require_enough(data: Dataset, *, remedy: str) -> None:
    """Raise RunError unless the halves of the data can be scored against each other.

    remedy: what gives more samples, for the message.
    """
    _, held_out = halves(len(data))  # never the larger half
    labels = data.labels.cpu()[held_out]
    compared = labels[evenly_spaced(DIVERSITY_SAMPLES, len(labels))]
    if len(labels) <= NEIGHBOURS or len(compared.unique()) == len(compared):
        raise RunError(
            f"the {len(data)} real samples cannot be scored: each half of them must have at least "
            f"{NEIGHBOURS + 1} samples, two of them of one class. That takes {remedy}"
        )
