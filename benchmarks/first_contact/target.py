"""Where a stage computes: on the GPU, or in a rehearsal on what stands in for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

import jvp_attn
from benchmarks.first_contact.settings import Settings
from tests.emulator import emulator
from tests.jvp_attn.emulated_backend import emulated_backend

HOPPER = (9, 0)


@dataclass(frozen=True)
class Target:
    """A device, and the CUDA kernels on it.

    Attributes:
        device: of tensors.
        capability: the compute capability.
        shrink: the factor by which sizes are smaller than on a GPU.
    """

    device: torch.device
    capability: tuple[int, int]
    shrink: int

    @property
    def is_gpu(self) -> bool:
        """False in a rehearsal."""
        return self.device.type == "cuda"

    def scaled(self, size: int) -> int:
        """A length or a number of heads, reduced in a rehearsal."""
        return max(size // self.shrink, 1)

    @contextmanager
    def kernels_compute(self) -> Iterator[None]:
        """In the block, attention is computed by the CUDA kernels, or raises."""
        with jvp_attn.backend("cuda") if self.is_gpu else emulated_backend(HOPPER):
            yield

    def extension(self) -> ModuleType:
        """The module with all kernels."""
        return importlib.import_module("jvp_attn._C") if self.is_gpu else emulator.load()


def target_of(settings: Settings) -> Target:
    """The GPU, or the emulator in a rehearsal.

    Raises:
        RuntimeError: there is no GPU, and this is no rehearsal.
    """
    if settings.rehearse:
        return Target(torch.device("cpu"), HOPPER, shrink=128)
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no NVIDIA GPU; --rehearse runs on the CPU")
    return Target(torch.device("cuda"), torch.cuda.get_device_capability(), shrink=1)
