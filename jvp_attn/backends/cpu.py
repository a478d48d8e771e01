"""The four primitives on a CPU, by the kernels of csrc/cpu: every dtype, mask and layout.

They accumulate in float32 (float64 for float64 inputs) and use as many threads as torch does.
Results do not depend on the number of threads. The gradient of a mask that is broadcast over batch,
heads or keys is summed in one thread.

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

    In half precision out_lo and tout_lo are the low-order parts of out and tout. In float32 out_lo
    is that of lse, (batch, heads, seqlen_q). In float64 they are None.

    Args:
        extension: `jvp_attn._cpu`.
        instruction_set: one of `extension.instruction_sets()`; the fastest by default.
    """

    def __init__(self, extension: Any, instruction_set: str | None = None) -> None:
        self._extension = extension
        self._instruction_set = instruction_set or extension.instruction_sets()[0]

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        """O, lse and, if requested, a low-order part."""
        out, lse, _ = meta.forward(inputs, options)
        outputs = Outputs(out, lse, _new_low_order_part(out, lse) if options.return_lo else None)
        self._run("forward", inputs, options, _named_outputs(outputs._asdict()))
        return outputs

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """O, lse, tO, mu and, if requested, low-order parts."""
        outputs = meta.forward_jvp(inputs, tangents, options)
        if options.return_lo:
            out_lo = _new_low_order_part(outputs.out, outputs.lse)
            is_half = inputs.q.dtype in (torch.float16, torch.bfloat16)
            tout_lo = torch.zeros_like(outputs.tout) if is_half else None
            outputs = outputs._replace(out_lo=out_lo, tout_lo=tout_lo)
        tensors = _named("t", tangents) | _named_outputs(outputs._asdict())
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
        if outputs.out_lo is None and inputs.q.dtype != torch.float64:
            outputs = self.forward(inputs, replace(options, return_lo=True))
        gradients = meta.backward(inputs, outputs, cotangents, needs, options)
        tensors = _named_outputs(outputs._asdict()) | _named("grad_", cotangents)
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
        if outputs.out_lo is None and inputs.q.dtype != torch.float64:
            outputs = self.forward_jvp(inputs, tangents, replace(options, return_lo=True))
        gradients, tangent_gradients = meta.jvp_backward(
            inputs, tangents, outputs, cotangents, needs, options
        )
        tensors = _named("t", tangents) | _named_outputs(outputs._asdict())
        tensors |= _named("grad_", cotangents)
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
        if any(_is_shared(tensors.get(x), q, k) for x in ("grad_mask", "grad_tmask")):
            params.threads = 1
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
            setattr(params, name, self._struct(name, x, packed=is_packed))
        getattr(self._extension, kernel)(params, self._instruction_set)

    def _struct(self, name: str, x: Tensor, packed: bool) -> Any:
        """The tensor as csrc/cpu/params.h describes it."""
        strides = x.stride()
        if name.endswith("mask"):
            steps = (0 if n == 1 else step for n, step in zip(x.shape, strides, strict=True))
            return self._extension.Mask(x.data_ptr(), *steps, _ELEMENTS[x.dtype])
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


def _new_low_order_part(out: Tensor, lse: Tensor) -> Tensor | None:
    if out.dtype == torch.float64:
        return None
    return torch.zeros_like(lse if out.dtype == torch.float32 else out)


def _named(
    prefix: str, tensors: Tangents | Gradients | Cotangents | JvpCotangents
) -> dict[str, Tensor]:
    """The tensors that are present, by their names in csrc/cpu/params.h."""
    return {f"{prefix}{name}": x for name, x in tensors._asdict().items() if x is not None}


def _named_outputs(outputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    named = {name: x for name, x in outputs.items() if x is not None}
    if "out_lo" in named and named["out"].dtype == torch.float32:
        named["lse_lo"] = named.pop("out_lo")
    return named


def _accumulator(gradient: Tensor) -> Tensor:
    """The tensor in which the gradient of a mask is summed, at least float32."""
    if gradient.dtype in (torch.float16, torch.bfloat16):
        return torch.zeros_like(gradient, dtype=torch.float32)
    return gradient


def _is_shared(gradient: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """Whether several threads, each with the keys of one head, would add to the same element."""
    if gradient is None:
        return False
    batch, heads, _, seqlen_k = gradient.shape
    return (batch, heads, seqlen_k) != (q.shape[0], q.shape[2], k.shape[1])
