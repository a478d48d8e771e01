"""Raises ImportError if torch is too old for this package. `jvp_attn` imports it first."""

import torch
from torch.torch_version import TorchVersion

MINIMUM = "2.11"

if TorchVersion(torch.__version__) < MINIMUM:
    raise ImportError(
        f"jvp_attn needs torch {MINIMUM} or newer, but torch {torch.__version__} is installed: run "
        f"pip install 'torch>={MINIMUM}'"
    )
