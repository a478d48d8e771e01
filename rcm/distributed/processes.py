"""stub"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch


@contextmanager
def processes(device, always_group=False):
    yield SimpleNamespace(rank=0, size=1, device=torch.device(device))
