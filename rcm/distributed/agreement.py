"""An error on one rank becomes an error on every rank, so that no rank waits for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from rcm.errors import OptionError, RunError

E = TypeVar("E", bound=BaseException)

# What every rank raises: the first class that fits, or the last one.
_KINDS: tuple[type[Exception], ...] = (RunError, OptionError, OSError, ValueError, RuntimeError)


@contextmanager
def errors_on_every_rank() -> Iterator[None]:
    """Wait at the end of the block for all ranks; raise on all of them if one raised.

    The lowest rank with an error decides: all ranks raise an error of its class (RunError,
    OptionError, OSError or ValueError, else RuntimeError) and message. The message names the rank
    unless all ranks have the same error. The block must not communicate. Every rank must enter it.
    Without a process group, or alone in it, errors pass unchanged.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    outcomes = _all_gather_text("" if error is None else _encoded(error))
    first = next((rank for rank, outcome in enumerate(outcomes) if outcome), None)
    if first is None:
        return
    index, host, message = outcomes[first].split("\n", 2)
    if len({outcome.partition("\n")[2].partition("\n")[2] for outcome in outcomes}) > 1:
        message = f"rank {first} on {host}: {message}"
    raise on_every_rank(_KINDS[int(index)](message)) from error


def on_every_rank(error: E) -> E:
    """Note that all ranks raise this error, so that only one of them prints it."""
    vars(error)["on_every_rank"] = True
    return error


def is_on_every_rank(error: BaseException) -> bool:
    """Whether all ranks raise this error, or the one that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if vars(cause).get("on_every_rank"):
            return True
        cause = cause.__cause__
    return False


def _encoded(error: Exception) -> str:
    index = next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)
    return f"{index}\n{socket.gethostname()}\n{error}"


def _all_gather_text(text: str) -> list[str]:
    """The texts of all ranks, sent as bytes."""
    data = text.encode()
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    if longest == 0:
        return [""] * len(lengths)
    padded = torch.tensor(list(data.ljust(longest, b"\0")), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded)
    return [
        bytes(row[: int(length)].tolist()).decode()
        for row, length in zip(received, lengths, strict=True)
    ]
