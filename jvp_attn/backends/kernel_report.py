"""Which kernels would compute a problem, and why: `python -m jvp_attn.info --shape ...`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch

from jvp_attn.backends.kernel_select import (
    HOPPER,
    PRIMITIVES,
    kernels_of,
    on_hopper,
    why_no_kernels,
    why_no_sizes,
)
from jvp_attn.backends.kernel_table import KernelEntry, padded_head_dim
from jvp_attn.backends.select import why_no_cpu_extension, why_no_device, why_no_extension
from jvp_attn.validation import check_attention


@dataclass(frozen=True, kw_only=True)
class KernelUse:
    """A kernel that would be launched. Fields are None if only the missing extension knows them."""

    name: str
    tile: tuple[int, int] | None  # rows, keys
    threads: int | None
    shared_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class PrimitiveReport:
    """How one primitive would be computed: the backend, its CUDA kernels, and why."""

    primitive: str
    backend: str
    kernels: tuple[KernelUse, ...]
    why: str


def report_problem(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    *,
    seqlen_k: int | None = None,
    heads_k: int | None = None,
    head_dim_v: int | None = None,
    masked: bool = False,
    capability: tuple[int, int] | None = None,
) -> list[PrimitiveReport]:
    """The kernels that the backend "automatic" would launch for each of the four primitives.

    Args:
        dtype: of q, k and v.
        shape: that of q, (batch, seqlen_q, heads, head_dim).
        seqlen_k, heads_k, head_dim_v: as in q if they are None.
        masked: whether there is an attn_mask, itself without tangent and gradient.
        capability: of any device, assumed to have the extension; None is the present device.

    Raises:
        TypeError, ValueError: attention does not support such shapes.
    """
    batch, seqlen_q, heads, head_dim = shape
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    k_shape = (batch, seqlen_k, heads if heads_k is None else heads_k, head_dim)
    v_shape = (*k_shape[:3], head_dim if head_dim_v is None else head_dim_v)
    q, k, v = (torch.empty(s, dtype=dtype, device="meta") for s in (shape, k_shape, v_shape))
    check_attention(q, k, v)

    of_sizes = reason = why_no_sizes(q, k, v)
    if is_here := capability is None:
        reason = of_sizes or why_no_device() or why_no_extension()
        capability = (0, 0) if reason else torch.cuda.get_device_capability()
    reason = reason or why_no_kernels(q, k, v, capability)
    if reason:
        on_cpu = is_here and not of_sizes and why_no_device() and not why_no_cpu_extension()
        backend = "cpu" if on_cpu else "tiled"
        return [
            PrimitiveReport(primitive=name, backend=backend, kernels=(), why=reason)
            for name in PRIMITIVES
        ]
    return [
        _primitive_report(name, dtype, head_dim, v_shape[3], masked, capability)
        for name in PRIMITIVES
    ]


def _primitive_report(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    masked: bool,
    capability: tuple[int, int],
) -> PrimitiveReport:
    padded = padded_head_dim(head_dim, head_dim_v)
    kernels = kernels_of(name, dtype, head_dim, head_dim_v, masked)
    if kernels is None:
        why = f"it has no kernel for head dim {padded}"
        return PrimitiveReport(primitive=name, backend="tiled", kernels=(), why=why)
    dims = f"{head_dim}" if head_dim == head_dim_v else f"{head_dim} and {head_dim_v}"
    why = f"{str(dtype).removeprefix('torch.')}, head dim {dims}"
    if padded != max(head_dim, head_dim_v) or head_dim != head_dim_v:
        why += f" padded to {padded}"
    if masked:
        why += ", with a mask"
    elif capability == HOPPER and head_dim % 8 == head_dim_v % 8 == 0:
        kernels = tuple(map(_on_hopper, kernels))
        why += ", strides of multiples of 16 bytes"
    return PrimitiveReport(
        primitive=name, backend="cuda", kernels=tuple(map(_kernel_use, kernels)), why=why
    )


def _on_hopper(kernel: KernelEntry) -> KernelEntry:
    """The kernel for Hopper that computes the same, unless this build lacks it."""
    known, faster = _compiled(), on_hopper(kernel)
    return faster if faster.name in known or not known else kernel


def _compiled() -> dict[str, dict[str, int]]:
    """Threads and shared memory of the kernels in the extension; empty if not installed."""
    return {} if why_no_extension() else import_module("jvp_attn._C").kernels()


def _kernel_use(kernel: KernelEntry) -> KernelUse:
    compiled = _compiled().get(kernel.name, {})
    return KernelUse(
        name=kernel.name,
        tile=kernel.tile,
        threads=compiled.get("threads"),
        shared_bytes=compiled.get("shared_bytes"),
    )


def as_text(reports: list[PrimitiveReport]) -> str:
    """Format reports, one kernel per line."""
    lines = []
    for report in reports:
        if report.kernels:
            lines.append((report.primitive, f"kernels for {report.why}"))
            lines += [("", f"  {_kernel_text(kernel)}") for kernel in report.kernels]
        else:
            lines.append((report.primitive, f"{report.backend}, because {report.why}"))
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def _kernel_text(kernel: KernelUse) -> str:
    facts = [kernel.name]
    if kernel.tile:
        facts.append("tile of {} rows x {} keys".format(*kernel.tile))
    if kernel.threads is not None and kernel.shared_bytes is not None:
        facts.append(f"{kernel.threads} threads, {kernel.shared_bytes / 1024:g} KiB shared memory")
    return ", ".join(facts)
