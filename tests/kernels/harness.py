"""Launches kernels in the emulator, and checks that they write nothing but their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import KERNELS
from tests.emulator import emulator
from tests.kernels.buffers import Buffer, Layout, matrix_buffer
from tests.kernels.dq_accum import ACCUMULATORS
from tests.kernels.reference import ROW_VECTORS, Problem

Buffers = Mapping[str, Buffer]

_CAUSAL = {"no": 0, "bottom_right": 1, "top_left": 2}
_MASK_KIND = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}

# What each step reads besides masks and lengths, and what it writes. Some tensors are both.
READS = {
    "forward": "q k v",
    "forward_jvp": "q k v tq tk tv",
    "forward_jvp_q": "q k v tq",
    "tangent_only": "q k v tq tk tv out out_lo lse lse_lo",
    "preprocess": "out out_lo tout tout_lo grad_out grad_tout grad_lse grad_mu",
    "backward": "q k v grad_out lse lse_lo delta",
    "bwd_postprocess": "k grad_lse dq_accum ds_row_sums",
    "backward_dq": "q k v grad_out grad_lse lse lse_lo delta",
    "backward_dkv": "q k v grad_out lse lse_lo delta",
    "jvp_backward_dq": "q k v tq tk tv grad_out grad_tout grad_lse grad_mu lse lse_lo mu beta"
    " delta",
    "jvp_backward_dkv": "q k v tq tk tv grad_out grad_tout lse lse_lo mu beta delta",
}
WRITES = {
    "forward": "out out_lo lse lse_lo",
    "forward_jvp": "out out_lo lse lse_lo tout tout_lo mu",
    "forward_jvp_q": "out out_lo lse lse_lo tout tout_lo mu",
    "tangent_only": "tout tout_lo mu",
    "preprocess": "beta delta",
    "backward": "grad_k grad_v dq_accum ds_row_sums",
    "bwd_postprocess": "grad_q",
    "backward_dq": "grad_q delta",
    "backward_dkv": "grad_k grad_v",
    "jvp_backward_dq": "grad_q grad_tq beta delta",
    "jvp_backward_dkv": "grad_k grad_v grad_tk grad_tv",
}


def row_buffer(shape: tuple[int, ...]) -> Buffer:
    """A (batch, heads, rows) row vector, with gaps between heads and between batches."""
    batch, heads, rows = shape
    del batch
    return Buffer(shape, torch.float32, (heads * (rows + 3) + 5, rows + 3, 1))


def row_buffer_of(x: Tensor) -> Buffer:
    """A copy of a row vector."""
    buffer = row_buffer(tuple(x.shape))
    buffer.view[...] = x
    return buffer


def mask_buffer_of(mask: Tensor, *, columns_first: bool) -> Buffer:
    """A copy of a mask, with stride 0 where it broadcasts."""
    strides, stride = [0, 0, 0, 0], 1
    for dim in (0, 1, 3, 2) if columns_first else (3, 2, 1, 0):
        if mask.shape[dim] > 1:
            strides[dim] = stride
            stride = stride * mask.shape[dim] + 1
    buffer = Buffer(tuple(mask.shape), mask.dtype, tuple(strides))
    buffer.view[...] = mask
    return buffer


def _lengths_buffer(lengths: Iterable[int]) -> Buffer:
    x = torch.tensor(list(lengths), dtype=torch.int32)
    buffer = Buffer(tuple(x.shape), torch.int32, (1,))
    buffer.view[...] = x
    return buffer


class Launch:
    """The parameters of a launch: a problem and its tensors.

    Args:
        problem: scale, masks and lengths.
        inputs: what the kernels may read.
        outputs: what they must write.
    """

    def __init__(
        self,
        problem: Problem,
        inputs: Buffers,
        outputs: Buffers,
        *,
        columns_of_mask_first: bool = False,
    ) -> None:
        self._buffers = {**inputs, **outputs}
        self._writable = set(outputs)
        self._machine = emulator.load()
        self.params = self._machine.AttentionParams()
        q, v = inputs["q"].view, inputs["v"].view
        self.params.batch, self.params.seqlen_q, self.params.heads, self.params.head_dim = q.shape
        _, self.params.seqlen_k, self.params.heads_k, self.params.head_dim_v = v.shape
        self.params.softmax_scale = problem.softmax_scale
        self.params.causal = _CAUSAL[problem.causal]
        self._packed = problem.cu_seqlens_q is not None
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
            lengths = getattr(problem, name)
            if lengths is not None:
                self._buffers[name] = _lengths_buffer(lengths)
                setattr(self.params, name, self._buffers[name].address)
        if self._packed:
            assert problem.cu_seqlens_q is not None
            assert problem.cu_seqlens_k is not None
            self.params.total_q, self.params.total_k = q.shape[1], v.shape[1]
            self.params.batch = len(problem.cu_seqlens_q) - 1
            self.params.seqlen_q = _longest(problem.cu_seqlens_q)
            self.params.seqlen_k = _longest(problem.cu_seqlens_k)
        for name, buffer in {**inputs, **outputs}.items():
            setattr(self.params, name, self._described(name, buffer))
        if problem.mask is not None:
            mask = mask_buffer_of(problem.mask, columns_first=columns_of_mask_first)
            self._buffers["mask"] = mask
            self.params.mask = self._machine.Mask(
                mask.address, *mask.view.stride(), _MASK_KIND[problem.mask.dtype]
            )

    def _described(self, name: str, buffer: Buffer) -> Any:
        batch, second, third = buffer.view.stride()[:3]
        if self._packed:
            batch = 0
        if name in (*ROW_VECTORS, *ACCUMULATORS):
            return self._machine.RowVector(buffer.address, batch, second)
        return self._machine.Tensor(buffer.address, batch, second, third)

    def run(self, *kernels: str, seed: int = 0) -> None:
        """Launch the kernels one after another. Later ones may read what earlier ones write.

        Raises:
            RuntimeError: a kernel broke a rule of CUDA; the message says where.
            AssertionError: memory outside the outputs was written.
        """
        for kernel in kernels:
            written = self._writable.intersection(WRITES[KERNELS[kernel].step].split())
            writable = {name: self._buffers[name] for name in written}
            readable = {n: b for n, b in self._buffers.items() if n not in writable}
            with emulator.launching(
                self._machine, seed=seed, inputs=_views(readable), outputs=_views(writable)
            ):
                self._machine.launch(kernel, self.params, 0)
        for name, buffer in self._buffers.items():
            assert buffer.surroundings_are_untouched(), f"written around {name}"


def _longest(starts: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(starts))


def _views(buffers: Buffers) -> dict[str, Tensor]:
    return {name: buffer.view for name, buffer in buffers.items()}


def output_buffers(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, layouts: Mapping[str, Layout]
) -> dict[str, Buffer]:
    """Memory for outputs: tensors in the given layouts, and row vectors."""
    return {
        name: row_buffer(shape)
        if name in ROW_VECTORS
        else matrix_buffer(shape, dtype, layouts[name])
        for name, shape in shapes.items()
    }
