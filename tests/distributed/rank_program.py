"""A program of several ranks that ends in many ways.

    torchrun --nproc-per-node 2 -m tests.distributed.rank_program ACTION FOLDER

FOLDER gets a file for each rank with its process id, once it is inside of the block.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from rcm.distributed.agreement import errors_on_every_rank
from rcm.distributed.heartbeat import HeartbeatConfig
from rcm.distributed.processes import Processes, processes
from rcm.errors import OptionError, RunError

HEARTBEAT = HeartbeatConfig(interval=0.1, timeout=1)


def work(ranks: Processes) -> None:
    """One collective."""
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == ranks.size


def end(ranks: Processes) -> None:
    work(ranks)


def end_late(ranks: Processes) -> None:
    """The last rank ends later than the others, and later than a rank counts as dead."""
    work(ranks)
    if ranks.rank == ranks.size - 1:
        time.sleep(2 * HEARTBEAT.timeout)


def work_forever(ranks: Processes) -> None:
    while True:
        work(ranks)
        time.sleep(0.01)


def sleep_forever(ranks: Processes) -> None:
    """The ranks do not communicate, so that only the heartbeat can find a dead one."""
    time.sleep(600)


def raise_on_rank_1(error: Exception) -> Callable[[Processes], None]:
    """Rank 1 raises while the others wait for it in a collective."""

    def action(ranks: Processes) -> None:
        work(ranks)
        if ranks.rank == 1:
            raise error
        work(ranks)

    return action


def raise_agreed(error: Exception) -> Callable[[Processes], None]:
    def action(ranks: Processes) -> None:
        with errors_on_every_rank():
            if ranks.rank == 1:
                raise error

    return action


def raise_together(ranks: Processes) -> None:
    time.sleep(0.05 * ranks.rank)
    raise OptionError("the mesh does not fit")


def exit_zero(ranks: Processes) -> None:
    work(ranks)
    if ranks.rank == 1:
        sys.exit(0)


ACTIONS: dict[str, Callable[[Processes], None]] = {
    "end": end,
    "end-late": end_late,
    "work": work_forever,
    "sleep": sleep_forever,
    "run-error": raise_on_rank_1(RunError("the disk\nis full")),
    "option-error": raise_on_rank_1(OptionError("the folder is missing")),
    "bug": raise_on_rank_1(ZeroDivisionError("not caught")),
    "agreed": raise_agreed(OptionError("the folder is empty")),
    "agreed-bug": raise_agreed(ZeroDivisionError("not caught")),
    "together": raise_together,
    "exit": exit_zero,
}


def main(action: str, folder: Path, device: str = "cpu", start_timeout: float = 20.0) -> int:
    torch.set_num_threads(1)
    try:
        with processes(device, heartbeat=HEARTBEAT, start_timeout=start_timeout) as ranks:
            starting = folder / f"{ranks.rank}.starting"
            starting.write_text(str(os.getpid()))
            starting.rename(folder / f"{ranks.rank}.pid")
            ACTIONS[action](ranks)
    except (OptionError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
