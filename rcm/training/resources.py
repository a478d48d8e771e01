"""What a run needs of its model, checked before it starts: that it fits samples and memory."""

from __future__ import annotations

import os

import torch

from rcm.data.dataset import DataFacts
from rcm.errors import OptionError
from rcm.training.config import FromScratchConfig

# Training holds at least the weights, their gradient, AdamW's two moments and the average.
COPIES_OF_WEIGHTS = 5


def require_fitting_model(config: FromScratchConfig, facts: DataFacts) -> None:
    """Check the config's model before a run starts.

    Raises OptionError if it does not fit the samples, or its training the memory of its device.
    """
    try:
        with torch.device("meta"):  # the shapes of the weights, without their memory
            network = config.model.build(facts.sample_shape, facts.classes)
    except ValueError as error:
        raise OptionError(f"--model.{error}") from error
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    needed, available = COPIES_OF_WEIGHTS * weights, _memory(torch.device(config.device))
    if needed > available:
        raise OptionError(
            f"model is too large: its training needs at least {needed / 1e9:.3g} GB for weights, "
            f"and {config.device} has {available / 1e9:.3g} GB. Choose a smaller {config.model}"
        )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
