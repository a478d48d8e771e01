"""A backend for tests: the CUDA backend with its kernels run by the emulator.

It computes in half precision: float64 and float32 inputs are rounded to float16 with the same
strides, and results are converted back. Finite numbers are clamped to the range of float16.
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
    """The primitives of the CUDA backend, for every dtype."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        """The primitive of this name."""
        primitive = getattr(self._backend, name)

        def in_half_precision(inputs: Inputs, *others: Any) -> Any:
            if inputs.q.dtype in _HALF:
                return primitive(inputs, *others)
            results = primitive(*tree_map_with_path(_rounded, (inputs, *others)))
            return tree_map_only(Tensor, lambda x: x.to(inputs.q.dtype), results)

        return in_half_precision


def _rounded(place: KeyPath, x: Any) -> Any:
    """Row vectors, (batch, heads, rows), and masks in float32, other tensors in float16."""
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
    """Compute attention with the emulator, as a device of this compute capability."""

    def kernels() -> InHalfPrecision:
        extension = emulator.load()
        return InHalfPrecision(
            CudaBackend(extension, lambda _: nullcontext(0), lambda _: capability)
        )

    emulated = select._Backend(kernels, meta=InHalfPrecision(MetaCudaBackend()))
    with (
        mock.patch.dict(select._BACKENDS, {"emulated": emulated}),
        jvp_attn.backend("emulated"),
    ):
        yield
