"""Which backend computes attention: automatic, or chosen by JVP_ATTN_BACKEND or `backend(name)`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jvp_attn import blockwise
from jvp_attn.maps import AttentionMaps

# Backends that implement the four maps. `math` is not among them: it is one differentiable formula.
_MAPS: dict[str, AttentionMaps] = {"blockwise": blockwise}
_AUTOMATIC = "automatic"
_chosen: ContextVar[str | None] = ContextVar("jvp_attn_backend", default=None)


def available_backends() -> tuple[str, ...]:
    """Names that `backend` accepts besides "automatic"."""
    return (*_MAPS, "math")


def current_backend() -> str:
    """The name asked for: by `backend`, else by JVP_ATTN_BACKEND, else "automatic".

    Raises:
        ValueError: JVP_ATTN_BACKEND names no backend.
    """
    name = _chosen.get()
    if name is None:
        name = os.environ.get("JVP_ATTN_BACKEND") or _AUTOMATIC
        _check_name(name, "the environment variable JVP_ATTN_BACKEND")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute attention with the named backend inside the block; backward passes keep it.

    Args:
        name: "blockwise", "math" or "automatic".

    Raises:
        ValueError: there is no backend of that name.
    """
    _check_name(name, "backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve_backend() -> str:
    """The backend that an attention call made now uses."""
    name = current_backend()
    return "blockwise" if name == _AUTOMATIC else name


def maps_of(name: str) -> AttentionMaps:
    """The four maps of a backend.

    Raises:
        ValueError: the backend does not exist or has no maps of its own.
    """
    if name not in _MAPS:
        raise ValueError(f"backend {name!r} has no attention maps; those that have: {[*_MAPS]}")
    return _MAPS[name]


def _check_name(name: str, origin: str) -> None:
    allowed = (_AUTOMATIC, *available_backends())
    if name not in allowed:
        raise ValueError(f"{origin} is {name!r}; it must be one of {', '.join(allowed)}")
