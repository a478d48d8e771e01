"""A backend for tests: the Python side of the CUDA backend, its kernels run by the emulator.

It computes in half precision: what comes in float64 or float32 is rounded to float16, keeping its
strides, and results go back in the dtype that they are expected in. What is finite stays so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, keystr, tree_map_only, tree_map_with_path

import jvp_attn
from jvp_attn.backends import select
from jvp_attn.backends.cuda import CudaBackend, MetaCudaBackend
from jvp_attn.backends.kernel_select import MIN_CAPABILITY
from jvp_attn.types import Inputs
from tests.emulator import emulator

_HALF = (torch.float16, torch.bfloat16)


class InHalfPrecision:
    """The four maps of kernels, for every dtype."""

    def __init__(self, maps: CudaBackend) -> None:
        self._maps = maps

    def __getattr__(self, name: str) -> Any:
        """A map of this name."""
        of_kernels = getattr(self._maps, name)

        def in_half_precision(inputs: Inputs, *others: Any) -> Any:
            if inputs.q.dtype in _HALF:
                return of_kernels(inputs, *others)
            results = of_kernels(*tree_map_with_path(_rounded, (inputs, *others)))
            return tree_map_only(Tensor, lambda x: x.to(inputs.q.dtype), results)

        return in_half_precision


def _rounded(place: KeyPath, x: Any) -> Any:
    """Row vectors, (batch, heads, rows), and masks in float32, other numbers in float16."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    is_float32 = x.ndim == 3 or keystr(place).endswith(".mask")
    return _in_dtype(x, torch.float32 if is_float32 else torch.float16)


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """With the same strides."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            return _in_dtype(x.narrow(dim, 0, 1), dtype).expand(x.shape)
    limits = torch.finfo(dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(
        torch.where(x.isfinite(), x.clamp(limits.min, limits.max), x)
    )


@contextmanager
def emulated_backend(capability: tuple[int, int] = MIN_CAPABILITY) -> Iterator[None]:
    """Compute attention with it inside the block, as on a device of this compute capability."""

    def kernels() -> InHalfPrecision:
        machine = emulator.load()
        return InHalfPrecision(CudaBackend(machine, lambda _: nullcontext(0), lambda _: capability))

    emulated = select._Backend(kernels, meta=InHalfPrecision(MetaCudaBackend()))
    with (
        mock.patch.dict(select._BACKENDS, {"emulated": emulated}),
        jvp_attn.backend("emulated"),
    ):
        yield
