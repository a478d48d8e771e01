"""The four maps by CUDA kernels.

Nothing synchronises, and all memory comes from torch, so that a CUDA graph may capture the maps.
`tangent_backward` has kernels for head dims up to 128; above, the backend `blockwise` computes it,
as exactly and more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jvp_attn import blockwise
from jvp_attn.kernel_call import KernelCall
from jvp_attn.kernel_table import KernelEntry
from jvp_attn.maps import (
    AttentionOptions,
    Gradients,
    Outputs,
    TangentGradients,
    TangentOutputs,
)


class KernelMaps:
    """The maps of `jvp_attn.maps.AttentionMaps`, for float16 and bfloat16.

    Args:
        extension: `jvp_attn._C`, or a module with the same kernels, AttentionParams and launch.
        stream_of: selects a device and gives the handle of the stream to launch on.
    """

    def __init__(
        self, extension: Any, stream_of: Callable[[torch.device], AbstractContextManager[int]]
    ) -> None:
        self._extension = extension
        self._stream_of = stream_of

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Outputs:
        """O, lse and, if asked for, what rounding took from O."""
        call = KernelCall(q, k, v, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        out_residual = call.new_out() if options.residuals else None

        call.give(out=out, lse=lse, out_residual=out_residual)
        self._launch("forward", call)
        return out, lse, out_residual

    def forward_tangent(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        options: AttentionOptions,
    ) -> TangentOutputs:
        """O, lse, tO, mu and, if asked for, what rounding took from O and tO."""
        call = KernelCall(q, k, v, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        tout, mu = call.new_out(), call.new_rows(0)
        tout_residual = call.new_out() if options.residuals else None
        # Where one kernel computes O and another continues from it, that one needs all of O.
        in_two_steps = len(self._kernels_of("forward_tangent", call)) > 1
        out_residual = call.new_out() if options.residuals or in_two_steps else None

        call.give(tq=tq, tk=tk, tv=tv)
        call.give(out=out, lse=lse, tout=tout, mu=mu)
        call.give(out_residual=out_residual, tout_residual=tout_residual)
        self._launch("forward_tangent", call)
        return out, lse, tout, mu, out_residual if options.residuals else None, tout_residual

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        out_residual: Tensor | None,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        options: AttentionOptions,
    ) -> Gradients:
        """The VJP of `forward`."""
        if out_residual is None and grad_out is not None:
            out, _, out_residual = self.forward(q, k, v, replace(options, residuals=True))
        call = KernelCall(q, k, v, options)
        gq, gk, gv = (call.new_gradient(x) for x in (q, k, v))

        call.give(out=out, lse=lse, out_residual=out_residual)
        call.give(grad_out=grad_out, grad_lse=grad_lse)
        call.give(delta=call.new_rows(0))
        call.give(grad_q=gq, grad_k=gk, grad_v=gv)
        self._launch("backward", call)
        return gq, gk, gv

    def tangent_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        out: Tensor,
        lse: Tensor,
        tout: Tensor,
        mu: Tensor,
        out_residual: Tensor | None,
        tout_residual: Tensor | None,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        grad_tout: Tensor | None,
        grad_mu: Tensor | None,
        options: AttentionOptions,
        needs_tangent_grads: tuple[bool, bool, bool],
    ) -> tuple[Gradients, TangentGradients]:
        """The VJP of `forward_tangent`; blockwise where no kernel has the head dim."""
        call = KernelCall(q, k, v, options)
        if call.kernels_of("tangent_backward") is None:
            return blockwise.tangent_backward(
                *(q, k, v, tq, tk, tv, out, lse, tout, mu, out_residual, tout_residual),
                *(grad_out, grad_lse, grad_tout, grad_mu),
                options,
                needs_tangent_grads,
            )
        reads_out = grad_out is not None or grad_tout is not None
        reads_tout = grad_tout is not None
        if (reads_out and out_residual is None) or (reads_tout and tout_residual is None):
            out, _, tout, _, out_residual, tout_residual = self.forward_tangent(
                q, k, v, tq, tk, tv, replace(options, residuals=True)
            )
        gq, gk, gv = (call.new_gradient(x) for x in (q, k, v))
        gtq, gtk, gtv = (
            call.new_gradient(x) if needed else None
            for x, needed in zip((q, k, v), needs_tangent_grads, strict=True)
        )

        call.give(tq=tq, tk=tk, tv=tv)
        call.give(out=out, lse=lse, tout=tout, mu=mu)
        call.give(out_residual=out_residual, tout_residual=tout_residual)
        call.give(grad_out=grad_out, grad_lse=grad_lse, grad_tout=grad_tout, grad_mu=grad_mu)
        call.give(beta=call.new_rows(0), delta=call.new_rows(0))
        call.give(grad_q=gq, grad_k=gk, grad_v=gv, grad_tq=gtq, grad_tk=gtk, grad_tv=gtv)
        self._launch("tangent_backward", call)
        return (gq, gk, gv), (gtq, gtk, gtv)

    def _kernels_of(self, map_name: str, call: KernelCall) -> tuple[KernelEntry, ...]:
        kernels = call.kernels_of(map_name)
        if kernels is None:
            raise ValueError(
                f"head dims {call.head_dim} and {call.head_dim_v}: no CUDA kernel of {map_name} "
                "has them; use `with jvp_attn.backend('blockwise')`"
            )
        return kernels

    def _launch(self, map_name: str, call: KernelCall) -> None:
        """Launch the kernels of a map, one after the other, with the same parameters."""
        kernels = self._kernels_of(map_name, call)
        if call.is_empty:
            return
        params = call.params(self._extension)
        with self._stream_of(call.device) as stream:
            for kernel in kernels:
                self._extension.launch(kernel.name, params, stream)


class ShapesOnly(KernelMaps):
    """Results of the right shapes, dtypes and strides, for tensors that hold no data."""

    def __init__(self) -> None:
        pass

    def _launch(self, map_name: str, call: KernelCall) -> None:
        pass


def kernel_maps() -> KernelMaps:
    """The maps by the kernels of the installed extension.

    Raises:
        ImportError: the extension is not there.
    """
    from jvp_attn import _C

    @contextmanager
    def current_stream(device: torch.device) -> Iterator[int]:
        with torch.cuda.device(device):
            # The extension has a CUDA runtime of its own.
            _C.select_device(torch.cuda.current_device())
            yield torch.cuda.current_stream().cuda_stream

    return KernelMaps(_C, current_stream)
