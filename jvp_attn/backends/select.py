"""The backend that computes attention, chosen by JVP_ATTN_BACKEND or `backend(name)`.

The default, "automatic", is `cuda` or `cpu` if their kernels support the problem, else `tiled`.
torch.compile reads the environment variable when it traces and ignores later changes; it respects
`backend(name)`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from jvp_attn.backends import cpu, cuda, meta, tiled
from jvp_attn.backends.kernel_select import why_no_kernels, why_no_sizes
from jvp_attn.backends.kernel_table import KERNELS
from jvp_attn.types import AttentionBackend


@dataclass(frozen=True)
class _Backend:
    """A loader of a backend, and its counterpart for fake and meta tensors."""

    load: Callable[[], AttentionBackend]
    meta: AttentionBackend


# `math` has no primitives: it is one differentiable formula.
_BACKENDS = {
    "tiled": _Backend(lambda: tiled, meta),
    "cpu": _Backend(cache(cpu.cpu_backend), cpu.MetaCpuBackend()),
    "cuda": _Backend(cache(cuda.cuda_backend), cuda.MetaCudaBackend()),
}
_AUTOMATIC = "automatic"


class _Choice(threading.local):
    """One per thread. torch.compile guards on a plain attribute and recompiles if it changes."""

    def __init__(self) -> None:
        self.backend: str | None = None


_choice = _Choice()


def available_backends() -> tuple[str, ...]:
    """Names that `backend` accepts besides "automatic": "cuda" and "cpu" only if installed."""
    return tuple(name for name in (*_BACKENDS, "math") if not _why_not_installed(name))


def current_backend() -> str:
    """The name set by `backend`, else by JVP_ATTN_BACKEND, else "automatic".

    Raises:
        ValueError: JVP_ATTN_BACKEND names no backend.
    """
    name = _choice.backend
    if name is None and (name := os.environ.get("JVP_ATTN_BACKEND")):
        _check_name(name, "the environment variable JVP_ATTN_BACKEND")
    return name or _AUTOMATIC


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute attention with the named backend inside the block; backward passes keep it.

    Args:
        name: "cuda", "cpu", "tiled", "math" or "automatic".

    Raises:
        ValueError: there is no backend of that name.
    """
    _check_name(name, "backend")
    before, _choice.backend = _choice.backend, name
    try:
        yield
    finally:
        _choice.backend = before


def resolve_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that computes attention of these queries, keys and values.

    Raises:
        ValueError: "cuda" or "cpu" is requested, but its kernels cannot compute this.
    """
    name = current_backend()
    if name == _AUTOMATIC:
        return next((x for x, why_not in _KERNELS.items() if not why_not(q, k, v)), "tiled")
    if name in _KERNELS and (reason := _KERNELS[name](q, k, v)):
        raise ValueError(
            f"backend {name!r} cannot compute this: {reason}; 'tiled' and 'automatic' can"
        )
    return name


def why_not_cuda(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the CUDA kernels cannot compute a problem; None if they can."""
    if q.device.type != "cuda":
        return f"q is on {q.device}, and the kernels run on CUDA devices"
    if reason := why_no_device() or why_no_extension():
        return reason
    capability = torch.cuda.get_device_capability(q.device)
    return why_no_kernels(q, k, v, capability)


def why_not_cpu(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the CPU kernels cannot compute a problem; None if they can."""
    if q.device.type != "cpu":
        return f"q is on {q.device}, and these kernels run on the CPU"
    return why_no_cpu_extension() or why_no_sizes(q, k, v)


_KERNELS = {"cuda": why_not_cuda, "cpu": why_not_cpu}


def why_no_device() -> str | None:
    """Why there is no device for the CUDA kernels; None if there is one."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@torch.compiler.assume_constant_result
def why_no_extension() -> str | None:
    """Why the CUDA extension cannot be used; None if it can."""
    return _why_no_extension()


@cache
def _why_no_extension() -> str | None:
    try:
        extension = import_module("jvp_attn._C")
    except ImportError as error:
        return f"the CUDA extension is not installed ({error})"
    if missing := KERNELS.keys() - extension.kernels().keys():
        return f"the CUDA extension is not of this version (it has no kernel {min(missing)})"
    return None


@torch.compiler.assume_constant_result
def why_no_cpu_extension() -> str | None:
    """Why the CPU extension cannot be used; None if it can."""
    return _why_no_cpu_extension()


@cache
def _why_no_cpu_extension() -> str | None:
    try:
        import_module("jvp_attn._cpu")
    except ImportError as error:
        return f"the CPU extension is not installed ({error})"
    return None


def get_backend(name: str) -> AttentionBackend:
    """The backend of this name.

    Raises:
        ValueError: the backend does not exist or has no primitives.
    """
    return _backend_named(name).load()


def get_meta_backend(name: str) -> AttentionBackend:
    """Its counterpart for fake and meta tensors, with results of the same shapes and strides.

    Raises:
        ValueError: the backend does not exist or has no primitives.
    """
    return _backend_named(name).meta


def _backend_named(name: str) -> _Backend:
    if name not in _BACKENDS:
        raise ValueError(
            f"backend {name!r} has no primitives; backends with primitives: {[*_BACKENDS]}"
        )
    return _BACKENDS[name]


def _check_name(name: str, origin: str) -> None:
    allowed = (_AUTOMATIC, *available_backends())
    if name not in allowed:
        why = f" ({reason})" if (reason := _why_not_installed(name)) else ""
        raise ValueError(f"{origin} is {name!r}; it must be one of {', '.join(allowed)}{why}")


def _why_not_installed(name: str) -> str | None:
    if name == "cuda":
        return why_no_extension()
    return why_no_cpu_extension() if name == "cpu" else None
