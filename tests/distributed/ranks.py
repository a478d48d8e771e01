"""Runs a function on processes of this machine that form a process group, as torchrun would."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# One that does not come to a meeting for so long will not come.
_PATIENCE = timedelta(minutes=2)


def run_on_ranks(function: Callable[[int], Any], ranks: int, folder: Path) -> list[Any]:
    """What `function(rank)` returns on each rank, in a process each.

    Args:
        function: of a module, for the processes to import. Returns tensors and text, in any nest
            of dictionaries and lists.
        ranks: how many processes.
        folder: empty, for the processes to meet in and to leave their results.
    """
    torch.multiprocessing.spawn(_run, (function, ranks, folder), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run(rank: int, function: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=_PATIENCE
    )
    try:
        torch.save(function(rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
