"""One attention problem on its way to the kernels: results to allocate, tensors to check.

Results that are as long as q lie in memory as q does, gradients are contiguous. A tensor whose last
dimension is not contiguous is copied; all other strides are for the kernels to follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvp_attn.kernel_choice import ELEMENT_OF_DTYPE, MAX_SEQLEN, kernels_of
from jvp_attn.kernel_table import KernelEntry
from jvp_attn.maps import AttentionOptions

_BOTTOM_RIGHT = 1  # in the enum Causal of csrc/params.h


class KernelCall:
    """The tensors of a call, under the names that they have in csrc/params.h.

    Raises:
        TypeError: the dtype is none that the kernels compute in.
        ValueError: a sequence is too long.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
        if q.dtype not in ELEMENT_OF_DTYPE:
            raise TypeError(
                f"q has dtype {q.dtype}, but the CUDA kernels compute in float16 and bfloat16: use "
                "`with jvp_attn.backend('blockwise')`"
            )
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] > MAX_SEQLEN:
                raise ValueError(
                    f"{name} has seqlen {x.shape[1]}, but the CUDA kernels take up to "
                    f"{MAX_SEQLEN}: use `with jvp_attn.backend('blockwise')`"
                )
        self._q, self._options = q, options
        self.batch, self.seqlen_q, self.heads, self.head_dim = q.shape
        self.seqlen_k, self.heads_k, self.head_dim_v = v.shape[1:]
        self._tensors: dict[str, Tensor] = {}
        self.give(q=q, k=k, v=v)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: results are then what they are allocated with."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._q.device

    def kernels_of(self, map_name: str) -> tuple[KernelEntry, ...] | None:
        """The kernels that compute a map; None where there are none."""
        return kernels_of(map_name, self._q.dtype, self.head_dim, self.head_dim_v)

    # ------------------------------------------------------------------------
    # Results

    def new_out(self) -> Tensor:
        """(batch, seqlen_q, heads, head_dim_v), its dimensions in memory in the order of q's."""
        shape = (self.batch, self.seqlen_q, self.heads, self.head_dim_v)
        strides = self._q.stride()
        order = [0, 1, 2, 3]
        if strides[3] == 1:
            # What is expanded has stride 0, and comes first.
            order[:3] = sorted(order[:3], key=lambda i: -strides[i] if strides[i] else -torch.inf)
        out = torch.empty_permuted(shape, order, dtype=self._q.dtype, device=self.device)
        return out.zero_() if self.is_empty else out

    def new_rows(self, value: float) -> Tensor:
        """(batch, heads, seqlen_q) float32, of this value where there is nothing to compute."""
        shape = (self.batch, self.heads, self.seqlen_q)
        rows = torch.empty(shape, dtype=torch.float32, device=self.device)
        return rows.fill_(value) if self.is_empty else rows

    def new_gradient(self, x: Tensor) -> Tensor:
        """Contiguous, of the shape of x."""
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        return gradient.zero_() if self.is_empty else gradient

    # ------------------------------------------------------------------------
    # What the kernels are given

    def give(self, **tensors: Tensor | None) -> None:
        """Let the kernels read or write these tensors; None is absent.

        Raises:
            TypeError, ValueError: a tensor does not fit, and a kernel would reach past its end.
        """
        for name, x in tensors.items():
            if x is not None:
                self._check(name, x)
                contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
                self._tensors[name] = x if contiguous else x.contiguous()

    def params(self, extension: Any) -> Any:
        """AttentionParams that point to the tensors given, and are valid as long as this call."""
        params = extension.AttentionParams()
        for name in ("batch", "seqlen_q", "seqlen_k", "heads", "heads_k", "head_dim", "head_dim_v"):
            setattr(params, name, getattr(self, name))
        params.softmax_scale = self._options.softmax_scale
        params.causal = _BOTTOM_RIGHT if self._options.causal else 0
        for name, x in self._tensors.items():
            struct = extension.Tensor if x.ndim == 4 else extension.RowVector
            setattr(params, name, struct(x.data_ptr(), *x.stride()[:-1]))
        return params

    def _check(self, name: str, x: Tensor) -> None:
        shape = self._shape_of(name)
        dtype = self._q.dtype if len(shape) == 4 else torch.float32
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device} but q is on {self.device}")

    def _shape_of(self, name: str) -> tuple[int, ...]:
        match name.removeprefix("grad_").removesuffix("_residual").removeprefix("t"):
            case "q":
                return self.batch, self.seqlen_q, self.heads, self.head_dim
            case "k":
                return self.batch, self.seqlen_k, self.heads_k, self.head_dim
            case "v":
                return self.batch, self.seqlen_k, self.heads_k, self.head_dim_v
            case "out":
                return self.batch, self.seqlen_q, self.heads, self.head_dim_v
            case _:
                return self.batch, self.heads, self.seqlen_q
