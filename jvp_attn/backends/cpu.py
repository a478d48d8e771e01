"""The four primitives on a CPU, by the kernels of csrc/cpu: every dtype, mask and layout.

They accumulate in float32 (float64 for float64 inputs) and use as many threads as torch does.
Results do not depend on the number of threads. One thread sums what is added to the same elements
of the gradient of a mask.

A tensor is copied only if its last dimension is not contiguous.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jvp_attn.backends import meta
from jvp_attn.backends.kernel_select import why_no_sizes
from jvp_attn.types import (
    AttentionOptions,
    Cotangents,
    Gradients,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)

# The enum Element of csrc/cpu/params.h.
_ELEMENTS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
}


class CpuBackend:
    """Implements `jvp_attn.types.AttentionBackend`.

    Only in half precision there are low-order parts of out and tout.

    Args:
        extension: `jvp_attn._cpu`.
        instruction_set: one of `extension.instruction_sets()`; the fastest by default.
    """

    def __init__(self, extension: Any, instruction_set: str | None = None) -> None:
        self._extension = extension
        self._instruction_set = instruction_set or extension.instruction_sets()[0]

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        """O, lse and, if requested, low-order parts."""
        outputs = meta.forward(inputs, options)
        if options.return_lo and _is_half(inputs):
            outputs = outputs._replace(out_lo=torch.zeros_like(outputs.out))
        self._run("forward", inputs, options, _named("", outputs))
        return outputs

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """O, lse, tO, mu and, if requested, low-order parts."""
        outputs = meta.forward_jvp(inputs, tangents, options)
        if options.return_lo and _is_half(inputs):
            out_lo, tout_lo = torch.zeros_like(outputs.out), torch.zeros_like(outputs.tout)
            outputs = outputs._replace(out_lo=out_lo, tout_lo=tout_lo)
        tensors = _named("t", tangents) | _named("", outputs)
        self._run("forward", inputs, options, tensors)
        return outputs

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> Gradients:
        """The VJP of `forward`."""
        if outputs.lse_lo is None:
            outputs = self.forward(inputs, replace(options, return_lo=True))
        gradients = meta.backward(inputs, outputs, cotangents, needs, options)
        tensors = _named("", outputs) | _named("grad_", cotangents)
        self._run_backward(inputs, options, tensors, gradients, Gradients())
        return gradients

    def jvp_backward(
        self,
        inputs: Inputs,
        tangents: Tangents,
        outputs: JvpOutputs,
        cotangents: JvpCotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> tuple[Gradients, Gradients]:
        """The VJP of `forward_jvp`."""
        if outputs.lse_lo is None:
            outputs = self.forward_jvp(inputs, tangents, replace(options, return_lo=True))
        gradients, tangent_gradients = meta.jvp_backward(
            inputs, tangents, outputs, cotangents, needs, options
        )
        tensors = _named("t", tangents) | _named("", outputs) | _named("grad_", cotangents)
        self._run_backward(inputs, options, tensors, gradients, tangent_gradients)
        return gradients, tangent_gradients

    def _run_backward(
        self,
        inputs: Inputs,
        options: AttentionOptions,
        tensors: dict[str, Tensor],
        gradients: Gradients,
        tangent_gradients: Gradients,
    ) -> None:
        targets = _named("grad_", gradients) | _named("grad_t", tangent_gradients)
        sums = {name: _accumulator(x) for name, x in targets.items() if name.endswith("mask")}
        self._run("backward", inputs, options, tensors | targets | sums)
        for name, total in sums.items():
            if total is not targets[name]:
                targets[name].copy_(total)

    def _run(
        self,
        kernel: str,
        inputs: Inputs,
        options: AttentionOptions,
        tensors: dict[str, Tensor],
    ) -> None:
        q, k, v, mask = inputs.primals
        if reason := why_no_sizes(q, k, v):
            raise ValueError(f"backend 'cpu' cannot compute this: {reason}; 'tiled' can")
        tensors = {"q": q, "k": k, "v": v} | tensors
        if mask is not None:
            tensors["mask"] = mask
        params = self._extension.AttentionParams()
        params.batch, params.seqlen_q, params.heads, params.head_dim = q.shape
        params.seqlen_k, params.heads_k, params.head_dim_v = v.shape[1:]
        params.softmax_scale, params.causal = options.softmax_scale, int(options.causal)
        params.element = _ELEMENTS[q.dtype]
        params.threads = torch.get_num_threads()
        alive = []  # until the kernel returns
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
            if (lengths := getattr(inputs, name)) is not None:
                alive.append(lengths := lengths.contiguous())
                setattr(params, name, lengths.data_ptr())
        if is_packed := inputs.cu_seqlens_q is not None:
            params.batch = len(inputs.cu_seqlens_q) - 1
        for name, x in tensors.items():
            if not name.endswith("mask") and x.stride(-1) != 1 and x.shape[-1] != 1:
                x = x.contiguous()
            alive.append(x)
            setattr(params, name, self._struct(name, x, options.mask_group, packed=is_packed))
        getattr(self._extension, kernel)(params, self._instruction_set)

    def _struct(self, name: str, x: Tensor, mask_group: int, *, packed: bool) -> Any:
        """The tensor as csrc/cpu/params.h describes it."""
        strides = x.stride()
        if name.endswith("mask"):
            steps = (0 if n == 1 else step for n, step in zip(x.shape, strides, strict=True))
            element, size = _ELEMENTS[x.dtype], x.shape[0]
            return self._extension.Mask(x.data_ptr(), *steps, element, size, mask_group)
        struct = self._extension.Tensor if x.ndim == 4 else self._extension.RowVector
        return struct(x.data_ptr(), 0 if packed else strides[0], *strides[1:-1])


class MetaCpuBackend(CpuBackend):
    """Results of the right shapes, dtypes and strides, for fake and meta tensors."""

    def __init__(self) -> None:
        pass

    def _run(self, *arguments: Any) -> None:
        pass


def cpu_backend() -> CpuBackend:
    """The backend with the installed extension.

    Raises:
        ImportError: the extension is not installed.
    """
    from jvp_attn import _cpu

    return CpuBackend(_cpu)


def _is_half(inputs: Inputs) -> bool:
    return inputs.q.dtype in (torch.float16, torch.bfloat16)


def _named(
    prefix: str,
    tensors: Outputs | JvpOutputs | Tangents | Gradients | Cotangents | JvpCotangents,
) -> dict[str, Tensor]:
    """The tensors that are present, by their names in csrc/cpu/params.h."""
    return {f"{prefix}{name}": x for name, x in tensors._asdict().items() if x is not None}


def _accumulator(gradient: Tensor) -> Tensor:
    """The tensor in which the gradient of a mask is summed, at least float32."""
    if gradient.dtype in (torch.float16, torch.bfloat16):
        return torch.zeros_like(gradient, dtype=torch.float32)
    return gradient
