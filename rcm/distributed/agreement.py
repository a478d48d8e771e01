"""An error on one rank becomes an error on every rank, so that no rank waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rcm.errors import OptionError, RunError

# What the other ranks raise. The first class that fits is taken.
_KINDS: tuple[type[Exception], ...] = (RunError, OptionError, OSError, ValueError, RuntimeError)


@contextmanager
def errors_on_every_rank() -> Iterator[None]:
    """Wait at the end of the block for all ranks; raise if any of them raised.

    The lowest rank with an error decides: the others raise an error of the same class (RunError,
    OptionError, OSError, ValueError, else RuntimeError) and message. The block must not
    communicate. Without a process group, errors pass unchanged.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not (dist.is_available() and dist.is_initialized()):
        if error is not None:
            raise error
        return
    rank, kind, message = _first_error(error)
    if rank is None:
        return
    if rank == dist.get_rank() and error is not None:
        raise error
    raise kind(message) from error


def _first_error(error: Exception | None) -> tuple[int | None, type[Exception], str]:
    """The lowest rank with an error (None: no rank has one), its class and message."""
    own = b""
    if error is not None:
        kind = next((i for i, k in enumerate(_KINDS) if isinstance(error, k)), len(_KINDS) - 1)
        own = bytes([kind]) + str(error).encode()
    size = torch.tensor(len(own))
    dist.all_reduce(size, dist.ReduceOp.MAX)
    if not size:
        return None, RuntimeError, ""
    # Padding with zeros: no text contains the byte 0.
    padded = torch.zeros(int(size) + 1, dtype=torch.uint8)
    if own:
        padded[: len(own) + 1] = torch.tensor([*own, 1], dtype=torch.uint8)
    every = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(every, padded)
    for rank, text in enumerate(every):
        content = bytes(text.tolist()).rstrip(b"\0")
        if content:
            return rank, _KINDS[content[0]], content[1:-1].decode()
    raise AssertionError("a rank has an error, but none sent it")
