"""The four maps by CUDA kernels.

Nothing synchronises, and all memory comes from torch, so that a CUDA graph may capture the maps.
Two things have no kernels, and the backend `tiled` computes them, as exactly and more slowly:
`jvp_backward` for head dims above 128, and the tangent and the gradient of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from jvp_attn.backends import meta, tiled
from jvp_attn.backends.kernel_call import KernelCall
from jvp_attn.backends.kernel_select import HOPPER, MIN_CAPABILITY
from jvp_attn.backends.kernel_table import KernelEntry
from jvp_attn.types import (
    AttentionBackend,
    AttentionOptions,
    Cotangents,
    Gradients,
    Inputs,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)


class CudaBackend:
    """The maps of `jvp_attn.types.AttentionBackend`, for float16 and bfloat16.

    Args:
        extension: `jvp_attn._C`, or a module with the same kernels, AttentionParams and launch.
        stream_of: selects a device and gives the handle of the stream to launch on.
        capability_of: the compute capability of a device.
    """

    _without_kernels: AttentionBackend = tiled

    def __init__(
        self,
        extension: Any,
        stream_of: Callable[[torch.device], AbstractContextManager[int]],
        capability_of: Callable[[torch.device], tuple[int, int]] = lambda device: MIN_CAPABILITY,
    ) -> None:
        self._extension = extension
        self._stream_of = stream_of
        self._capability_of = capability_of

    def forward(self, inputs: Inputs, options: AttentionOptions) -> Outputs:
        """O, lse and, if asked for, what rounding took from O."""
        call = KernelCall(inputs, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        out_lo = call.new_out() if options.return_lo else None

        call.give(out=out, lse=lse, out_lo=out_lo)
        self._launch("forward", call)
        return Outputs(out, lse, out_lo)

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """O, lse, tO, mu and, if asked for, what rounding took from O and tO."""
        if tangents.mask is not None:
            return self._without_kernels.forward_jvp(inputs, tangents, options)
        call = KernelCall(inputs, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        tout, mu = call.new_out(), call.new_rows(0)
        tout_lo = call.new_out() if options.return_lo else None
        # Where one kernel computes O and another continues from it, that one needs all of O.
        in_two_steps = len(self._kernels_of("forward_jvp", call)) > 1
        out_lo = call.new_out() if options.return_lo or in_two_steps else None

        call.give(tq=tangents.q, tk=tangents.k, tv=tangents.v)
        call.give(out=out, lse=lse, tout=tout, mu=mu)
        call.give(out_lo=out_lo, tout_lo=tout_lo)
        self._launch("forward_jvp", call)
        if not options.return_lo:
            out_lo = None
        return JvpOutputs(out, lse, tout, mu, out_lo, tout_lo)

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> Gradients:
        """The VJP of `forward`, by sums in an order that varies only where options let it."""
        if needs[3]:
            return self._without_kernels.backward(inputs, outputs, cotangents, needs, options)
        if outputs.out_lo is None and cotangents.out is not None:
            outputs = self.forward(inputs, replace(options, return_lo=True))
        call = KernelCall(inputs, options)
        gradients = _new_gradients(call, inputs, (True, True, True, False))

        call.give(out=outputs.out, lse=outputs.lse, out_lo=outputs.out_lo)
        call.give(grad_out=cotangents.out, grad_lse=cotangents.lse)
        call.give(delta=call.new_rows(0))
        call.give(grad_q=gradients.q, grad_k=gradients.k, grad_v=gradients.v)
        may_vary = not (options.deterministic or torch.are_deterministic_algorithms_enabled())
        self._launch("backward", call, nondeterministic=may_vary and needs[0])
        return _needed(gradients, needs)

    def jvp_backward(
        self,
        inputs: Inputs,
        tangents: Tangents,
        outputs: JvpOutputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> tuple[Gradients, Gradients]:
        """The VJP of `forward_jvp`."""
        call = KernelCall(inputs, options)
        asks_of_mask = tangents.mask is not None or needs[3] or needs[7]
        if asks_of_mask or call.kernels_of("jvp_backward") is None:
            return self._without_kernels.jvp_backward(
                inputs, tangents, outputs, cotangents, needs, options
            )
        reads_out = cotangents.out is not None or cotangents.tout is not None
        reads_tout = cotangents.tout is not None
        if (reads_out and outputs.out_lo is None) or (reads_tout and outputs.tout_lo is None):
            outputs = self.forward_jvp(inputs, tangents, replace(options, return_lo=True))
        gradients = _new_gradients(call, inputs, (True, True, True, False))
        tangent_gradients = _new_gradients(call, inputs, needs[4:])

        call.give(tq=tangents.q, tk=tangents.k, tv=tangents.v)
        call.give(**outputs._asdict())
        call.give(grad_out=cotangents.out, grad_lse=cotangents.lse)
        call.give(grad_tout=cotangents.tout, grad_mu=cotangents.mu)
        call.give(beta=call.new_rows(0), delta=call.new_rows(0))
        call.give(grad_q=gradients.q, grad_k=gradients.k, grad_v=gradients.v)
        call.give(
            grad_tq=tangent_gradients.q, grad_tk=tangent_gradients.k, grad_tv=tangent_gradients.v
        )
        self._launch("jvp_backward", call)
        return _needed(gradients, needs[:4]), tangent_gradients

    def _kernels_of(self, map_name: str, call: KernelCall) -> tuple[KernelEntry, ...]:
        kernels = call.kernels_of(map_name)
        if kernels is None:
            raise ValueError(
                f"no CUDA kernel of {map_name} has these head dims; use "
                "`with jvp_attn.backend('tiled')`"
            )
        return kernels

    def _launch(self, map_name: str, call: KernelCall, *, nondeterministic: bool = False) -> None:
        """Launch the kernels of a map, one after the other, with the same parameters.

        Args:
            map_name, call: what to compute.
            nondeterministic: whether sums of `backward` may come in an order that varies.
        """
        kernels = self._kernels_of(map_name, call)
        if call.is_empty:
            return
        if self._capability_of(call.device) == HOPPER:
            kernels = tuple(self._on_hopper(kernel, call) for kernel in kernels)
            if nondeterministic and (that_sum := self._backward_atomic_dq(call)):
                call.give(**call.new_sums())
                kernels = that_sum
        params = call.params(self._extension)
        with self._stream_of(call.device) as stream:
            for kernel in kernels:
                self._extension.launch(kernel.name, params, stream)

    def _on_hopper(self, kernel: KernelEntry, call: KernelCall) -> KernelEntry:
        """As `call.on_hopper`, if this build has it."""
        faster = call.on_hopper(kernel)
        return faster if faster.name in self._compiled else kernel

    def _backward_atomic_dq(self, call: KernelCall) -> tuple[KernelEntry, ...] | None:
        """As `call.backward_atomic_dq`, if this build has all of them."""
        kernels = call.backward_atomic_dq()
        if kernels is None or not self._compiled.issuperset(kernel.name for kernel in kernels):
            return None
        return kernels

    @cached_property
    def _compiled(self) -> frozenset[str]:
        """The names of the kernels in the extension."""
        return frozenset(self._extension.kernels())


class MetaCudaBackend(CudaBackend):
    """Results of the right shapes, dtypes and strides, for tensors that hold no data."""

    _without_kernels: AttentionBackend = meta

    def __init__(self) -> None:
        pass

    def _launch(self, map_name: str, call: KernelCall, *, nondeterministic: bool = False) -> None:
        pass


def cuda_backend() -> CudaBackend:
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

    return CudaBackend(_C, current_stream, torch.cuda.get_device_capability)


def _new_gradients(call: KernelCall, inputs: Inputs, needs: Needs) -> Gradients:
    return Gradients(
        *(
            call.new_gradient(x) if needed and x is not None else None
            for x, needed in zip(inputs[:4], needs, strict=True)
        )
    )


def _needed(gradients: Gradients, needs: Needs) -> Gradients:
    """Without those that the kernels compute along with the others."""
    pairs = zip(gradients, needs, strict=True)
    return Gradients(*(gradient if needed else None for gradient, needed in pairs))
