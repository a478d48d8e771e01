"""A backend for tests: the Python side of the CUDA backend, its kernels run by the emulator.

It computes in half precision: what comes in float64 or float32 is rounded to float16, keeping its
strides, and results go back in the dtype that they are expected in. What is finite stays so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import emulator
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import jvp_attn
from jvp_attn import backends
from jvp_attn.cuda import KernelMaps

_HALF = (torch.float16, torch.bfloat16)


class EmulatedMaps:
    """The four maps, for every dtype."""

    def __init__(self) -> None:
        self._maps = KernelMaps(emulator.load(), lambda device: nullcontext(0))

    def __getattr__(self, name: str) -> Any:
        """A map of this name."""
        of_kernels = getattr(self._maps, name)

        def in_half_precision(q: Tensor, *arguments: Any) -> Any:
            if q.dtype in _HALF:
                return of_kernels(q, *arguments)
            results = of_kernels(*tree_map_only(Tensor, _rounded, (q, *arguments)))
            return tree_map_only(Tensor, lambda x: x.to(q.dtype), results)

        return in_half_precision


def _rounded(x: Tensor) -> Tensor:
    """In float16 with the same strides; row vectors, (batch, heads, rows), in float32."""
    dtype = torch.float32 if x.ndim == 3 else torch.float16
    limits = torch.finfo(dtype)
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            return _rounded(x.narrow(dim, 0, 1)).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(
        torch.where(x.isfinite(), x.clamp(limits.min, limits.max), x)
    )


@contextmanager
def emulated_backend() -> Iterator[None]:
    """Compute attention with it inside the block."""
    with (
        mock.patch.dict(backends._MAPS, {"emulated": EmulatedMaps()}),
        jvp_attn.backend("emulated"),
    ):
        yield
