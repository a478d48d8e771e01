"""Run a function on several local processes that form a process group, as torchrun would."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from rcm.distributed.processes import destroy_group

# A rank that waits longer than this in a collective raises.
_TIMEOUT = timedelta(minutes=2)


def run_on_ranks(function: Callable[[int], Any], ranks: int, folder: Path) -> list[Any]:
    """The results of `function(rank)`, each computed in its own process.

    Args:
        function: a module-level function, so that the processes can import it. It returns tensors
            and strings, in dictionaries and lists.
        ranks: the number of processes.
        folder: an empty folder for the rendezvous and the results.
    """
    torch.multiprocessing.spawn(_run, (function, ranks, folder), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run(rank: int, function: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=_TIMEOUT
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    destroy_group()
    os._exit(0)  # without the end of Python, which a late thread of gloo would abort
