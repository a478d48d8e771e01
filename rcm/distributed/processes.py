"""Join the process group that torchrun starts, or run alone, and end all ranks together.

    python -m rcm.train digits                                      one process
    torchrun --standalone --nproc-per-node 8 -m rcm.train digits    8 GPUs of one machine

    with processes("cuda") as ranks:
        train(ranks.device)

If one rank fails, the others end within seconds; if one dies or is stopped, within a minute
(heartbeat.py). Each failure is printed once by the rank that has it, with the name of the rank. An
error that all ranks raise together (agreement.py) is printed by rank 0, and the traceback of an
unexpected one also by the ranks where it began.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rcm.distributed.agreement import is_on_every_rank
from rcm.distributed.heartbeat import Heartbeat, HeartbeatConfig
from rcm.distributed.rendezvous import Launch, connect, connect_again, join
from rcm.errors import OptionError, RunError

# A collective may wait for a rank that loads or saves for long; the heartbeat finds the dead ones.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
END_SECONDS = 0.5  # in which threads of gloo end; several ranks may share a core
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
DEVICE = re.compile(r"(cpu|cuda)(?::(\d{1,2}))?")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    """Its number, in 0..size-1."""
    size: int
    """The number of processes on all machines."""
    local_rank: int
    """Its number among the processes of its machine."""
    device: torch.device
    """Where it computes: cpu, or its own GPU."""


@contextmanager
def processes(
    device: str,
    *,
    always_group: bool = False,
    heartbeat: HeartbeatConfig | None = None,
    start_timeout: float = 300.0,
) -> Iterator[Processes]:
    """Inside, the ranks started by torchrun form a process group; all leave the block together.

    Args:
        device: cpu, cuda or cuda:N. Under torchrun, cuda means the GPU of LOCAL_RANK.
        always_group: in a single process, start a group of one rank, as FSDP2 needs it. It uses no
            port and no network.
        heartbeat: when a rank counts as dead.
        start_timeout: seconds within which all ranks must have started.

    Raises:
        OptionError: the environment variables of torchrun are incomplete or contradict each other,
            or the machine lacks the device.
        RunError: the port is in use, or ranks are missing.
        SystemExit: without a message, instead of an error that another rank prints.
    """
    launch = Launch.from_environment()
    if launch is None:
        with _single_process(device, always_group) as alone:
            yield alone
    else:
        with _joined(launch, device, heartbeat or HeartbeatConfig(), start_timeout) as ranks:
            yield ranks


def is_main() -> bool:
    """Whether this process prints: rank 0, or a single process. Also outside of the block."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _single_process(device: str, with_group: bool) -> Iterator[Processes]:
    alone = Processes(0, 1, 0, local_device(device))
    if not with_group:
        yield alone
        return
    _start_group(alone, dist.HashStore())
    try:
        yield alone
    finally:
        destroy_group()


@contextmanager
def _joined(
    launch: Launch, device: str, config: HeartbeatConfig, start_timeout: float
) -> Iterator[Processes]:
    store = connect(launch, start_timeout)
    join(launch, store, start_timeout)
    own_connection = connect_again(launch, start_timeout)
    heartbeat = Heartbeat(own_connection, launch.rank, launch.size, config)
    heartbeat.start()
    try:
        # From here on, a failure of this rank ends the others too.
        found = local_device(device, launch.local_rank, launch.size)
        ranks = Processes(launch.rank, launch.size, launch.local_rank, found)
        _start_group(ranks, dist.PrefixStore("group", store))
        yield ranks
    except BaseException as error:
        try:
            _leave_after(error, heartbeat, launch)
        finally:
            # Destroying NCCL's group may wait for ranks that have failed; the process ends anyway.
            if dist.is_initialized() and found.type == "cpu":
                destroy_group(END_SECONDS)
        raise
    heartbeat.leave()
    destroy_group(END_SECONDS)


def destroy_group(seconds: float = 0.1) -> None:
    """Destroy the process group, at the end of a process.

    A thread of gloo may be the last to hold the tensors of the last collective. It needs Python's
    global interpreter lock to release them, and a thread that asks for the lock while Python ends
    aborts the process. So it gets these seconds before.
    """
    dist.destroy_process_group()
    time.sleep(seconds)


def _leave_after(error: BaseException, heartbeat: Heartbeat, launch: Launch) -> None:
    """Make one rank print the error: return on this rank, raise SystemExit on the others."""
    if isinstance(error, SystemExit) and not error.code:
        heartbeat.leave()
        return
    is_interrupt = isinstance(error, KeyboardInterrupt)
    is_expected = isinstance(error, OptionError | RunError)
    # As rcm.command_line and rcm.train.
    exit_code = 2 if isinstance(error, OptionError) else 130 if is_interrupt else 1
    if is_on_every_rank(error):
        heartbeat.leave()
        has_traceback = not is_expected and error.__cause__ is not None  # of this rank's own error
        if launch.rank > 0 and not has_traceback:
            raise SystemExit(exit_code) from error
        return
    if _is_lost_connection(error):
        heartbeat.await_verdict()  # of the rank at the other end, which died or failed
    if is_expected:
        message = str(error)
    elif is_interrupt:
        message = "interrupted"
    else:
        message = f"{type(error).__name__}: {error}"
    prints = heartbeat.fail(message)
    if (is_expected or is_interrupt) and not prints:
        raise SystemExit(exit_code) from error
    if is_expected and launch.size > 1:
        kind = OptionError if isinstance(error, OptionError) else RunError
        raise kind(f"{heartbeat.name}: {error}") from error


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error comes from a collective, such as after the death of another rank."""
    if error is None:
        return False
    is_of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_of_gloo or isinstance(error, dist.DistError) or _is_lost_connection(error.__cause__)


def _start_group(ranks: Processes, store: dist.Store) -> None:
    dist.init_process_group(
        BACKENDS[ranks.device.type],
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=ranks.device if ranks.device.type == "cuda" else None,
    )


def local_device(device: str, local_rank: int | None = None, size: int = 1) -> torch.device:
    """The device of this process, of which there are `size`; local_rank is None for a single one.

    Raises:
        OptionError: the machine does not have it.
    """
    parsed = DEVICE.fullmatch(device)
    if not parsed:
        raise OptionError(f"device is {device!r}; it must be cpu, cuda or cuda:N")
    kind, index = parsed.groups()
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OptionError(f"device is {device!r}, but PyTorch finds no CUDA device")
    if index is not None and size > 1:
        raise OptionError(f"device is {device!r} for {size} ranks; give them cuda, a GPU each")
    number, count = int(index or local_rank or 0), torch.cuda.device_count()
    if number >= count:
        raise OptionError(
            f"{device!r} needs GPU {number}, but this machine has {count}; start at most "
            f"{count} processes on it (--nproc-per-node), or choose cuda:N with N in 0..{count - 1}"
        )
    found = torch.device("cuda", number)
    torch.cuda.set_device(found)
    return found
