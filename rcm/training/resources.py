"""What a run needs of the machine, checked before it starts: its device, and memory for weights."""

from __future__ import annotations

import os

import torch

from rcm.errors import OptionError
from rcm.training.config import FromScratchConfig, RunConfig

# Training holds at least the weights, their gradient, AdamW's two moments and the average.
COPIES_OF_WEIGHTS = 5


def require_device(config: RunConfig) -> None:
    """Raise OptionError unless the machine has the config's device."""
    device = torch.device(config.device)
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise OptionError(f"device is {config.device!r}, but PyTorch finds no CUDA device")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise OptionError(
            f"device is {config.device!r}; it must be cuda:N with N in 0..{count - 1}"
        )


def require_memory(config: FromScratchConfig) -> None:
    """Raise OptionError if training the config's model cannot fit in the memory of its device."""
    with torch.device("meta"):  # the shapes of the weights, without their memory
        network = config.model.build(config.data.sample_shape, config.data.classes)
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
