"""One attention problem on its way to the kernels: results to allocate, tensors to check.

A tensor whose last dimension is not contiguous is copied; all other strides are for the kernels to
follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvp_attn.backends import meta
from jvp_attn.backends.kernel_select import (
    ELEMENT_OF_DTYPE,
    MAX_SEQLEN,
    backward_atomic_dq,
    kernels_of,
    on_hopper,
)
from jvp_attn.backends.kernel_table import KernelEntry
from jvp_attn.types import AttentionOptions, Inputs

_SUMS = ("dq_accum", "ds_row_sums")

# The enum MaskKind of csrc/params.h.
_BOOLEAN, _ADDITIVE_ELEMENT, _ADDITIVE_FLOAT32 = 1, 2, 3


class KernelCall:
    """The tensors of a call, under the names that they have in csrc/params.h.

    Raises:
        TypeError: the dtype is none that the kernels compute in.
        ValueError: a sequence is too long.
    """

    def __init__(self, inputs: Inputs, options: AttentionOptions) -> None:
        q, k, v = inputs[:3]
        if q.dtype not in ELEMENT_OF_DTYPE:
            raise TypeError(
                f"q has dtype {q.dtype}, but the CUDA kernels compute in float16 and bfloat16: use "
                "`with jvp_attn.backend('tiled')`"
            )
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] > MAX_SEQLEN:
                raise ValueError(
                    f"{name} has seqlen {x.shape[1]}, but the CUDA kernels take up to "
                    f"{MAX_SEQLEN}: use `with jvp_attn.backend('tiled')`"
                )
        self._inputs, self._options = inputs, options
        self._tensors: dict[str, Tensor] = {}
        self.give(q=q, k=k, v=v)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: results are then as before any key is seen."""
        lengths = self._problem()
        return 0 in (lengths["batch"], lengths["seqlen_q"], lengths["seqlen_k"])

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._inputs.q.device

    def kernels_of(self, map_name: str) -> tuple[KernelEntry, ...] | None:
        """The kernels that compute a map; None where there are none."""
        q, _, v, mask, *_ = self._inputs
        return kernels_of(map_name, q.dtype, q.shape[3], v.shape[3], mask is not None)

    def on_hopper(self, kernel: KernelEntry) -> KernelEntry:
        """What computes the same on Hopper: a kernel for it alone, if there is one that can."""
        if not self._suits_hopper:
            return kernel
        q_tangent_only = not {"tk", "tv"} & self._tensors.keys()
        return on_hopper(kernel, q_tangent_only=q_tangent_only)

    def backward_atomic_dq(self) -> tuple[KernelEntry, ...] | None:
        """Kernels for Hopper alone that compute `backward` by sums in an order that varies.

        None where there are none that can. They need `new_sums`.
        """
        q, _, v, mask, *_ = self._inputs
        if mask is not None or not self._suits_hopper:
            return None
        return backward_atomic_dq(q.dtype, q.shape[3], v.shape[3])

    @property
    def _suits_hopper(self) -> bool:
        """Whether the kernels for it take the tensors given.

        They load tiles with the TMA, which knows tensors by strides that are multiples of
        16 bytes, and not 0. They scale scores after they have chosen the largest, so that the
        scale must be positive.
        """
        tensors = [x for x in self._tensors.values() if x.ndim == 4]
        return self._options.softmax_scale > 0 and all(map(_suits_copy_engine, tensors))

    # ------------------------------------------------------------------------
    # Results. The kernels write all of them, but for what belongs to no sequence

    def new_out(self) -> Tensor:
        """(batch, seqlen_q, heads, head_dim_v), as `meta.new_out`."""
        return self._started(meta.new_out(self._inputs), 0)

    def new_rows(self, value: float) -> Tensor:
        """(batch, heads, seqlen_q) float32, of this value where there is nothing to compute."""
        return self._started(meta.new_rows(self._inputs), value)

    def new_gradient(self, x: Tensor) -> Tensor:
        """Contiguous, of the shape of x."""
        return self._started(meta.new_gradient(x), 0)

    def new_sums(self) -> dict[str, Tensor]:
        """Zeros, float32, to which the kernels of `backward_atomic_dq` add."""
        q = self._inputs.q
        return {name: q.new_zeros(self._shape_of(name), dtype=torch.float32) for name in _SUMS}

    def _started(self, x: Tensor, value: float) -> Tensor:
        return x.fill_(value) if self.is_empty or self._is_packed else x

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
        for name, number in self._problem().items():
            setattr(params, name, number)
        params.softmax_scale = self._options.softmax_scale
        params.causal = int(self._options.causal)
        for name, x in self._tensors.items():
            strides = x.stride()[:-1]
            if self._is_packed:
                strides = (0, *strides[1:])
            struct = extension.Tensor if x.ndim == 4 else extension.RowVector
            setattr(params, name, struct(x.data_ptr(), *strides))
        if self._inputs.mask is not None:
            params.mask = self._mask(extension, self._inputs.mask)
        if self._is_packed:
            self._ends = [x.contiguous() for x in self._inputs[4:] if x is not None]
            params.cu_seqlens_q, params.cu_seqlens_k = (x.data_ptr() for x in self._ends)
        return params

    @property
    def _is_packed(self) -> bool:
        return self._inputs.cu_seqlens_q is not None

    def _problem(self) -> dict[str, int]:
        """The sizes in AttentionParams."""
        batch, seqlen_q, heads, head_dim = self._inputs.q.shape
        seqlen_k, heads_k, head_dim_v = self._inputs.v.shape[1:]
        if self._inputs.cu_seqlens_q is not None and self._options.max_seqlens is not None:
            batch = self._inputs.cu_seqlens_q.shape[0] - 1
            longest_q, longest_k = self._options.max_seqlens
            seqlen_q, seqlen_k = min(longest_q, seqlen_q), min(longest_k, seqlen_k)
        return {
            "batch": batch,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "total_q": self._inputs.q.shape[1],
            "total_k": self._inputs.k.shape[1],
            "heads": heads,
            "heads_k": heads_k,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
        }

    @property
    def _rows_of_sums(self) -> int:
        """In each sequence they are a multiple of so many, which csrc/common/dq_accum.cuh says."""
        multiple, seqlen_q = 128, self._inputs.q.shape[1]
        if self._inputs.cu_seqlens_q is None:
            return -(-seqlen_q // multiple) * multiple
        return (seqlen_q // multiple + self._problem()["batch"]) * multiple

    def _mask(self, extension: Any, mask: Tensor) -> Any:
        kind = _ADDITIVE_ELEMENT
        if mask.dtype == torch.bool:
            kind = _BOOLEAN
        elif mask.dtype == torch.float32:
            kind = _ADDITIVE_FLOAT32
        # A dimension of 1 is read again and again.
        strides = (
            0 if size == 1 else stride
            for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        return extension.Mask(mask.data_ptr(), *strides, kind)

    def _check(self, name: str, x: Tensor) -> None:
        shape = self._shape_of(name)
        dtype = self._inputs.q.dtype if len(shape) == 4 else torch.float32
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device} but q is on {self.device}")

    def _shape_of(self, name: str) -> tuple[int, ...]:
        batch, seqlen_q, heads, head_dim = self._inputs.q.shape
        seqlen_k, heads_k, head_dim_v = self._inputs.v.shape[1:]
        match name.removeprefix("grad_").removesuffix("_lo").removeprefix("t"):
            case "q":
                return batch, seqlen_q, heads, head_dim
            case "k":
                return batch, seqlen_k, heads_k, head_dim
            case "v":
                return batch, seqlen_k, heads_k, head_dim_v
            case "out":
                return batch, seqlen_q, heads, head_dim_v
            case "dq_accum":
                return batch, heads, self._rows_of_sums * -(-head_dim // 8) * 8
            case "ds_row_sums":
                return batch, heads, self._rows_of_sums
            case _:
                return batch, heads, seqlen_q


def _suits_copy_engine(x: Tensor) -> bool:
    sizes_and_strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        x.data_ptr() % 16 == 0
        and x.shape[-1] % 8 == 0
        and all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in sizes_and_strides)
    )
