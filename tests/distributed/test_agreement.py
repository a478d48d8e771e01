"""An error of one rank is raised on every rank, with the name of the rank."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from rcm.distributed.agreement import errors_on_every_rank, is_on_every_rank
from rcm.errors import OptionError, RunError
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

# The errors of ranks 0 and 1.
NONE = (None, None)
SECOND = (None, FileNotFoundError(2, "no such file", "weights"))
BOTH = (RunError("é" * 50), OptionError("shorter"))
ALIKE = (OptionError("the mesh does not fit"),) * 2
UNKNOWN = (KeyError("x"), None)
CASES = (NONE, SECOND, BOTH, ALIKE, UNKNOWN)


def outcomes(rank: int) -> list[str]:
    """The errors that this rank has after each case, and whether it knows that all have them."""
    found = []
    for errors in CASES:
        error = None
        try:
            with errors_on_every_rank():
                if (own := errors[rank]) is not None:
                    raise own
        except Exception as raised:
            error = raised
        wrapped = RuntimeError("wrapped")
        wrapped.__cause__ = error
        assert error is None or (is_on_every_rank(error) and is_on_every_rank(wrapped))
        found.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    return found


def test_every_rank_raises_the_error_of_the_first_rank(tmp_path: Path) -> None:
    first, second = run_on_ranks(outcomes, 2, tmp_path)
    assert first == second
    host = socket.gethostname()
    assert first == [
        "NoneType: None",
        f"OSError: rank 1 on {host}: [Errno 2] no such file: 'weights'",
        f"RunError: rank 0 on {host}: {'é' * 50}",
        "OptionError: the mesh does not fit",
        f"RuntimeError: rank 0 on {host}: 'x'",
    ]


def test_a_single_process_raises_its_own_error() -> None:
    error = KeyError("x")
    with pytest.raises(KeyError) as raised, errors_on_every_rank():
        raise error
    assert raised.value is error
    assert not is_on_every_rank(error)
