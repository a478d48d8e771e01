"""The four primitives by CUDA kernels.

Nothing synchronises, and all memory comes from torch, so a CUDA graph may capture the primitives.
Two things have no kernels yet; the backend `tiled` computes them, equally exactly and more slowly:
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
    InputNeeds,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
    split_needs,
)

_QKV = InputNeeds(q=True, k=True, v=True)


class CudaBackend:
    """Implements `jvp_attn.types.AttentionBackend` for float16 and bfloat16.

    Args:
        extension: `jvp_attn._C`, or a module with the same kernels, limits, AttentionParams and
            launch.
        stream_of: selects a device and yields the handle of the stream to launch on.
        capability_of: the compute capability of a device.
    """

    _fallback: AttentionBackend = tiled

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
        """O, lse and, if requested, their low-order parts."""
        call = KernelCall(inputs, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        out_lo, lse_lo = (call.new_out(), call.new_rows(0)) if options.return_lo else (None, None)

        call.bind(out=out, lse=lse, out_lo=out_lo, lse_lo=lse_lo)
        self._launch("forward", call)
        return Outputs(out, lse, out_lo, lse_lo)

    def forward_jvp(
        self, inputs: Inputs, tangents: Tangents, options: AttentionOptions
    ) -> JvpOutputs:
        """O, lse, tO, mu and, if requested, the low-order parts of O, tO and lse."""
        if tangents.mask is not None:
            return self._fallback.forward_jvp(inputs, tangents, options)
        call = KernelCall(inputs, options)
        out, lse = call.new_out(), call.new_rows(-torch.inf)
        tout, mu = call.new_out(), call.new_rows(0)
        tout_lo = call.new_out() if options.return_lo else None
        # If a second kernel continues from O and lse, it needs their low-order parts too.
        in_two_steps = len(self._kernels_of("forward_jvp", call)) > 1
        of_forward = options.return_lo or in_two_steps
        out_lo, lse_lo = (call.new_out(), call.new_rows(0)) if of_forward else (None, None)

        call.bind(tq=tangents.q, tk=tangents.k, tv=tangents.v)
        call.bind(out=out, lse=lse, tout=tout, mu=mu)
        call.bind(out_lo=out_lo, tout_lo=tout_lo, lse_lo=lse_lo)
        self._launch("forward_jvp", call)
        if not options.return_lo:
            out_lo = lse_lo = None
        return JvpOutputs(out, lse, tout, mu, out_lo, tout_lo, lse_lo)

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        cotangents: Cotangents,
        needs: Needs,
        options: AttentionOptions,
    ) -> Gradients:
        """The VJP of `forward`, accumulated atomically only if the options allow it."""
        wanted = InputNeeds(*needs)
        if wanted.mask:
            return self._fallback.backward(inputs, outputs, cotangents, needs, options)
        reads_out = cotangents.out is not None
        if outputs.lse_lo is None or (reads_out and outputs.out_lo is None):
            outputs = self.forward(inputs, replace(options, return_lo=True))
        call = KernelCall(inputs, options)
        gradients = _new_gradients(call, inputs, _QKV)

        call.bind(**outputs._asdict())
        call.bind(grad_out=cotangents.out, grad_lse=cotangents.lse)
        call.bind(delta=call.new_rows(0))
        call.bind(grad_q=gradients.q, grad_k=gradients.k, grad_v=gradients.v)
        deterministic = options.deterministic or torch.are_deterministic_algorithms_enabled()
        self._launch("backward", call, nondeterministic=wanted.q and not deterministic)
        return _needed(gradients, wanted)

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
        call = KernelCall(inputs, options)
        wanted, tangents_wanted = split_needs(needs)
        differentiates_mask = tangents.mask is not None or wanted.mask or tangents_wanted.mask
        if differentiates_mask or call.kernels_of("jvp_backward") is None:
            return self._fallback.jvp_backward(
                inputs, tangents, outputs, cotangents, needs, options
            )
        reads_tout = cotangents.tout is not None
        reads_out = reads_tout or cotangents.out is not None
        if (
            outputs.lse_lo is None
            or (reads_out and outputs.out_lo is None)
            or (reads_tout and outputs.tout_lo is None)
        ):
            outputs = self.forward_jvp(inputs, tangents, replace(options, return_lo=True))
        gradients = _new_gradients(call, inputs, _QKV)
        tangent_gradients = _new_gradients(call, inputs, tangents_wanted)

        call.bind(tq=tangents.q, tk=tangents.k, tv=tangents.v)
        call.bind(**outputs._asdict())
        call.bind(grad_out=cotangents.out, grad_lse=cotangents.lse)
        call.bind(grad_tout=cotangents.tout, grad_mu=cotangents.mu)
        call.bind(beta=call.new_rows(0), delta=call.new_rows(0))
        call.bind(grad_q=gradients.q, grad_k=gradients.k, grad_v=gradients.v)
        call.bind(
            grad_tq=tangent_gradients.q, grad_tk=tangent_gradients.k, grad_tv=tangent_gradients.v
        )
        self._launch("jvp_backward", call)
        return _needed(gradients, wanted), tangent_gradients

    def _kernels_of(self, primitive: str, call: KernelCall) -> tuple[KernelEntry, ...]:
        kernels = call.kernels_of(primitive)
        if kernels is None:
            raise ValueError(
                f"no CUDA kernel of {primitive} has these head dims; use "
                "`with jvp_attn.backend('tiled')`"
            )
        return kernels

    def _launch(self, primitive: str, call: KernelCall, *, nondeterministic: bool = False) -> None:
        """Launch the kernels of a primitive, one after the other, with the same parameters.

        Args:
            primitive, call: what to compute.
            nondeterministic: whether `backward` may accumulate the gradient of q atomically.
        """
        kernels = self._kernels_of(primitive, call)
        if call.is_empty:
            return
        if self._capability_of(call.device) == HOPPER:
            kernels = self._kernels_on_hopper(kernels, call, nondeterministic)
        params = call.params(self._extension)
        with self._stream_of(call.device) as stream:
            for kernel in kernels:
                self._extension.launch(kernel.name, params, stream)

    def _kernels_on_hopper(
        self, kernels: tuple[KernelEntry, ...], call: KernelCall, nondeterministic: bool
    ) -> tuple[KernelEntry, ...]:
        """The kernels for Hopper that this build has and that fit the call, else those given."""
        if not call.fits_tma(self._limits):
            return kernels
        if nondeterministic and (atomic := self._backward_atomic_dq(call)):
            call.bind_dq_accumulators(self._limits)
            return atomic
        faster = map(call.on_hopper, kernels)
        return tuple(
            ours if ours.name in self._compiled else kernel
            for ours, kernel in zip(faster, kernels, strict=True)
        )

    def _backward_atomic_dq(self, call: KernelCall) -> tuple[KernelEntry, ...] | None:
        kernels = call.backward_atomic_dq()
        if kernels is None or not self._compiled.issuperset(kernel.name for kernel in kernels):
            return None
        return kernels

    @cached_property
    def _compiled(self) -> frozenset[str]:
        """The names of the kernels in the extension."""
        return frozenset(self._extension.kernels())

    @cached_property
    def _limits(self) -> dict[str, int]:
        """What the kernels require of addresses, strides and sizes."""
        limits: dict[str, int] = self._extension.limits()
        return limits


class MetaCudaBackend(CudaBackend):
    """Results of the right shapes, dtypes and strides, for fake and meta tensors."""

    _fallback: AttentionBackend = meta

    def __init__(self) -> None:
        pass

    def _launch(self, primitive: str, call: KernelCall, *, nondeterministic: bool = False) -> None:
        pass


def cuda_backend() -> CudaBackend:
    """The backend with the installed extension.

    Raises:
        ImportError: the extension is not installed.
    """
    from jvp_attn import _C

    @contextmanager
    def current_stream(device: torch.device) -> Iterator[int]:
        with torch.cuda.device(device):
            # The extension has its own CUDA runtime.
            _C.select_device(torch.cuda.current_device())
            yield torch.cuda.current_stream().cuda_stream

    return CudaBackend(_C, current_stream, torch.cuda.get_device_capability)


def _new_gradients(call: KernelCall, inputs: Inputs, needs: InputNeeds) -> Gradients:
    return Gradients(
        *(
            call.new_gradient(x) if needed and x is not None else None
            for x, needed in zip(inputs.primals, needs, strict=True)
        )
    )


def _needed(gradients: Gradients, needs: InputNeeds) -> Gradients:
    """Only the gradients that are needed: the kernels compute those of q, k and v together."""
    pairs = zip(gradients, needs, strict=True)
    return Gradients(*(gradient if needed else None for gradient, needed in pairs))
