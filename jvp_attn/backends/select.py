"""Which backend computes attention: automatic, or chosen by JVP_ATTN_BACKEND or `backend(name)`.

Automatic is `cuda` or `cpu` where their kernels can compute the problem, else `tiled`.
torch.compile reads the variable when it traces, and does not see it change afterwards; it does see
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
from jvp_attn.backends.kernel_select import why_no_kernels
from jvp_attn.backends.kernel_table import KERNELS
from jvp_attn.types import AttentionBackend


@dataclass(frozen=True)
class _Backend:
    """The four maps, made when they are needed, and what they are for tensors without data."""

    maps: Callable[[], AttentionBackend]
    without_data: AttentionBackend


# `math` is not among them: it is one differentiable formula.
_BACKENDS = {
    "tiled": _Backend(lambda: tiled, meta),
    "cpu": _Backend(cache(cpu.cpu_backend), cpu.MetaCpuBackend()),
    "cuda": _Backend(cache(cuda.cuda_backend), cuda.MetaCudaBackend()),
}
_AUTOMATIC = "automatic"


class _Choice(threading.local):
    """One for each thread. torch.compile sees when a plain attribute changes, and compiles anew."""

    def __init__(self) -> None:
        self.backend: str | None = None


_choice = _Choice()


def available_backends() -> tuple[str, ...]:
    """Names that `backend` accepts besides "automatic"; those of extensions only with these."""
    return tuple(name for name in (*_BACKENDS, "math") if not _why_not_installed(name))


def current_backend() -> str:
    """The name asked for: by `backend`, else by JVP_ATTN_BACKEND, else "automatic".

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


def resolve_backend(q: Tensor, k: Tensor) -> str:
    """The backend that an attention call made now with these queries and keys uses.

    Raises:
        ValueError: "cuda" or "cpu" is asked for, and its kernels cannot compute this.
    """
    name = current_backend()
    if name == _AUTOMATIC:
        return next((x for x, why_not in _KERNELS.items() if not why_not(q, k)), "tiled")
    if name in _KERNELS and (reason := _KERNELS[name](q, k)):
        raise ValueError(f"backend {name!r} cannot compute this: {reason}; 'automatic' can")
    return name


def why_not_cuda(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels do not compute a problem; None where they do."""
    if q.device.type != "cuda":
        return f"q is on {q.device}, and the kernels run on CUDA devices"
    if reason := why_no_device() or why_no_extension():
        return reason
    capability = torch.cuda.get_device_capability(q.device)
    return why_no_kernels(q.dtype, q.shape[1], k.shape[1], capability)


def why_not_cpu(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels of the CPU do not compute a problem; None where they do."""
    if q.device.type != "cpu":
        return f"q is on {q.device}, and these kernels run on the CPU"
    return why_no_cpu_extension() or cpu.why_too_long(q, k)


_KERNELS = {"cuda": why_not_cuda, "cpu": why_not_cpu}


def why_no_device() -> str | None:
    """Why there is nothing to run kernels on; None where there is."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@torch.compiler.assume_constant_result
def why_no_extension() -> str | None:
    """Why the CUDA extension cannot be used; None where it can."""
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
    """Why the CPU extension cannot be used; None where it can."""
    return _why_no_cpu_extension()


@cache
def _why_no_cpu_extension() -> str | None:
    try:
        import_module("jvp_attn._cpu")
    except ImportError as error:
        return f"the CPU extension is not installed ({error})"
    return None


def get_backend(name: str) -> AttentionBackend:
    """The four maps of a backend.

    Raises:
        ValueError: the backend does not exist or has no maps of its own.
    """
    return _backend_of(name).maps()


def get_meta_backend(name: str) -> AttentionBackend:
    """Those for tensors that hold no data, which give results of the same shapes and strides.

    Raises:
        ValueError: the backend does not exist or has no maps of its own.
    """
    return _backend_of(name).without_data


def _backend_of(name: str) -> _Backend:
    if name not in _BACKENDS:
        raise ValueError(f"backend {name!r} has no attention maps; those that have: {[*_BACKENDS]}")
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
