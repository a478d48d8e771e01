"""Runs of `python -m rcm.train digits` on several ranks, with the variables of torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from rcm import train
from rcm.data.dataset import Dataset
from rcm.errors import RunError
from tests.distributed.launched_ranks import free_port
from tests.rcm.commands.tiny_run import small_data

Action = Callable[[list[str]], int]


def start_on_ranks(
    runs: Sequence[tuple[Action, list[str]]], ranks: int, folder: Path
) -> list[list[int]]:
    """Start runs one after the other, in the same processes, on 200 digits.

    runs: module-level functions like `train.main`, with the options of the command.
    folder: an empty folder for what the ranks print on stderr, in a file RANK.err each.

    Returns the exit codes of each rank.
    """
    ports = [free_port() for _ in runs]
    torch.multiprocessing.spawn(_run, (runs, ports, ranks, folder), nprocs=ranks)
    return [
        [int(code) for code in (folder / f"{rank}.codes").read_text().split()]
        for rank in range(ranks)
    ]


def _run(
    rank: int,
    runs: Sequence[tuple[Action, list[str]]],
    ports: list[int],
    ranks: int,
    folder: Path,
) -> None:
    torch.set_num_threads(1)
    with open(folder / f"{rank}.err", "w") as file:
        os.dup2(file.fileno(), 2)
    codes: list[object] = []
    with small_data():
        for (action, options), port in zip(runs, ports, strict=True):
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            try:
                codes.append(action(options))
            except SystemExit as stop:  # another rank prints the error
                codes.append(stop.code)
    (folder / f"{rank}.codes").write_text(" ".join(map(str, codes)))


def train_with_a_bad_sample(options: list[str]) -> int:
    """Rank 1 cannot read its part of the fourth batch; the first is read before the first step."""
    read, number = Dataset.batch, 0

    def batch(self: Dataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        nonlocal number
        number += 1
        if number == 4 and os.environ["RANK"] == "1":
            raise RunError(f"sample {indices[0]} cannot be read")
        return read(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        return train.main(options)
