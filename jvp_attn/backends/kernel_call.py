"""The arguments of one kernel launch: allocates results, checks tensors, fills AttentionParams.

A tensor whose last dimension is not contiguous is copied; the kernels support all other strides.
"""

from __future__ import annotations

from collections.abc import Mapping
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

# The enum MaskKind of csrc/params.h.
_BOOLEAN, _ADDITIVE_ELEMENT, _ADDITIVE_FLOAT32 = 1, 2, 3


class KernelCall:
    """The tensors of a call, by their names in csrc/params.h.

    Raises:
        TypeError: the kernels do not support the dtype.
        ValueError: a sequence is too long.
    """

    def __init__(self, inputs: Inputs, options: AttentionOptions) -> None:
        q, k, v, _ = inputs.primals
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
        self._lengths: list[Tensor] = []  # keeps contiguous copies alive
        self.bind(q=q, k=k, v=v)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: results then keep their initial values."""
        sizes = self._sizes()
        return 0 in (sizes["batch"], sizes["seqlen_q"], sizes["seqlen_k"], sizes["heads"])

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._inputs.q.device

    def kernels_of(self, primitive: str) -> tuple[KernelEntry, ...] | None:
        """The kernels that compute a primitive; None if there are none."""
        q, _, v, mask = self._inputs.primals
        return kernels_of(primitive, q.dtype, q.shape[3], v.shape[3], mask is not None)

    def fits_tma(self, limits: Mapping[str, int]) -> bool:
        """Whether the kernels for Hopper support the tensors bound so far.

        They load tiles by TMA, which requires aligned addresses and positive, aligned strides. They
        apply the softmax scale after the row maximum, so the scale must be positive.
        """
        tensors = [x for x in self._tensors.values() if x.ndim == 4]
        return self._options.softmax_scale > 0 and all(_fits_tma(x, limits) for x in tensors)

    def on_hopper(self, kernel: KernelEntry) -> KernelEntry:
        """The kernel for Hopper that computes the same, else the one given. See `fits_tma`."""
        q_tangent_only = not {"tk", "tv"} & self._tensors.keys()
        return on_hopper(kernel, q_tangent_only=q_tangent_only)

    def backward_atomic_dq(self) -> tuple[KernelEntry, ...] | None:
        """Kernels for Hopper that compute `backward` and accumulate the gradient of q atomically.

        None if there are none. They need `bind_dq_accumulators`. See `fits_tma`.
        """
        q, _, v, mask = self._inputs.primals
        if mask is not None:
            return None
        return backward_atomic_dq(q.dtype, q.shape[3], v.shape[3])

    # ------------------------------------------------------------------------
    # Results. The kernels write all of them except rows beyond the last packed sequence

    def new_out(self) -> Tensor:
        """(batch, seqlen_q, heads, head_dim_v), as `meta.new_out`."""
        return self._prefill(meta.new_out(self._inputs), 0)

    def new_rows(self, value: float) -> Tensor:
        """(batch, heads, seqlen_q) float32, with this value in rows that no kernel writes."""
        return self._prefill(meta.new_rows(self._inputs), value)

    def new_gradient(self, x: Tensor) -> Tensor:
        """Contiguous, of the shape of x."""
        return self._prefill(meta.new_gradient(x), 0)

    def bind_dq_accumulators(self, limits: Mapping[str, int]) -> None:
        """Allocate zeros, float32, to which the kernels of `backward_atomic_dq` add.

        csrc/common/dq_accum.cuh describes their layout. Head dims are multiples of 8 here.
        """
        batch, seqlen_q, heads, head_dim = self._inputs.q.shape
        multiple = limits["dq_accum_row_multiple"]
        if self._is_packed:  # the rows of each sequence start at a multiple
            rows = (seqlen_q // multiple + self._sizes()["batch"]) * multiple
        else:
            rows = -(-seqlen_q // multiple) * multiple
        shapes = {
            "dq_accum": (batch, heads, rows * head_dim),
            "ds_row_sums": (batch, heads, rows),
        }
        for name, shape in shapes.items():
            self._tensors[name] = self._inputs.q.new_zeros(shape, dtype=torch.float32)

    def _prefill(self, x: Tensor, value: float) -> Tensor:
        return x.fill_(value) if self.is_empty or self._is_packed else x

    # ------------------------------------------------------------------------
    # Parameters of the kernels

    def bind(self, **tensors: Tensor | None) -> None:
        """Let the kernels read or write these tensors; None is absent.

        Raises:
            TypeError, ValueError: a tensor does not fit; a kernel would access memory beyond it.
        """
        for name, x in tensors.items():
            if x is not None:
                self._check(name, x)
                contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
                self._tensors[name] = x if contiguous else x.contiguous()

    def params(self, extension: Any) -> Any:
        """AttentionParams that point to the bound tensors; valid as long as this object lives."""
        params = extension.AttentionParams()
        for name, number in self._sizes().items():
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
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
            if (lengths := getattr(self._inputs, name)) is not None:
                self._lengths.append(lengths := lengths.contiguous())
                setattr(params, name, lengths.data_ptr())
        return params

    @property
    def _is_packed(self) -> bool:
        return self._inputs.cu_seqlens_q is not None

    def _sizes(self) -> dict[str, int]:
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

    def _mask(self, extension: Any, mask: Tensor) -> Any:
        kind = _ADDITIVE_ELEMENT
        if mask.dtype == torch.bool:
            kind = _BOOLEAN
        elif mask.dtype == torch.float32:
            kind = _ADDITIVE_FLOAT32
        # A dimension of 1 is broadcast.
        strides = (
            0 if size == 1 else stride
            for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        group = self._options.mask_group
        return extension.Mask(mask.data_ptr(), *strides, kind, mask.shape[0], group)

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
        match name.removeprefix("grad_").removeprefix("t").removesuffix("_lo"):
            case "q":
                return batch, seqlen_q, heads, head_dim
            case "k":
                return batch, seqlen_k, heads_k, head_dim
            case "v":
                return batch, seqlen_k, heads_k, head_dim_v
            case "out":
                return batch, seqlen_q, heads, head_dim_v
            case "lse" | "mu" | "beta" | "delta":
                return batch, heads, seqlen_q
        raise KeyError(f"AttentionParams have no tensor {name}")


def _fits_tma(x: Tensor, limits: Mapping[str, int]) -> bool:
    elements = limits["tma_alignment_elements"]
    sizes_and_strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return (
        x.data_ptr() % limits["tma_alignment_bytes"] == 0
        and x.shape[-1] % elements == 0
        and all(
            size == 1 or (stride > 0 and stride % elements == 0)
            for size, stride in sizes_and_strides
        )
    )
