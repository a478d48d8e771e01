"""Runs the kernel tests, which were written for the emulator, on a device.

tests/kernels launches kernels on tensors in CPU memory, and checks that memory afterwards. Here the
same memory is copied to a device, byte for byte, and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

_ADDRESSES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")


@dataclass(frozen=True)
class _Described:
    """A Tensor, RowVector or Mask of csrc/params.h, with an address on the CPU."""

    kind: str
    address: int
    rest: tuple[int, ...]


def _described(kind: str, address: int, *rest: int) -> _Described:
    return _Described(kind, address, rest)


class KernelsOnDevice:
    """Replaces the module tests/emulator/emulator.py, and the extension module that it loads.

    Args:
        extension: `jvp_attn._C`, or a module with the same kernels.
        device: where the kernels run.
    """

    AttentionParams = SimpleNamespace
    Tensor = staticmethod(partial(_described, "Tensor"))
    RowVector = staticmethod(partial(_described, "RowVector"))
    Mask = staticmethod(partial(_described, "Mask"))

    def __init__(self, extension: ModuleType, device: torch.device) -> None:
        self._extension = extension
        self._device = device
        self._copies: list[tuple[Tensor, Tensor]] = []

    def load(self) -> KernelsOnDevice:
        """The module with the kernels."""
        return self

    @contextmanager
    def launching(
        self,
        machine: KernelsOnDevice,
        *,
        seed: int,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> Iterator[None]:
        """Copy all memory to the device, and back after the launches; inputs must be unchanged."""
        del machine, seed  # the order of threads on a GPU cannot be chosen
        self._copies = [self._copy(x) for x in (*inputs.values(), *outputs.values())]
        yield
        for name, (host, copy) in zip((*inputs, *outputs), self._copies, strict=True):
            if name in inputs:
                assert torch.equal(host, copy.cpu()), f"{name} was written"
            else:
                host.copy_(copy)

    def launch(self, name: str, params: SimpleNamespace, stream: int) -> None:
        """Launch a kernel; the stream is the current one."""
        on_device = self._extension.AttentionParams()
        for field, value in vars(params).items():
            if isinstance(value, _Described):
                struct = getattr(self._extension, value.kind)
                setattr(on_device, field, struct(self._translated(value.address), *value.rest))
            else:
                setattr(on_device, field, self._translated(value) if field in _ADDRESSES else value)
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        self._extension.launch(name, on_device, stream)

    def _copy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All bytes of a tensor's storage, and their copy."""
        host = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        return host, host.to(self._device, copy=True)

    def _translated(self, address: int) -> int:
        for host, copy in self._copies:
            offset = address - host.data_ptr()
            if 0 <= offset <= host.numel():
                return copy.data_ptr() + offset
        raise ValueError(f"the address {address:#x} is in no memory that was copied")
