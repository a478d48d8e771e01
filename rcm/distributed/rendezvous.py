"""Where the ranks meet: the environment of torchrun, and the key-value store on its master."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from rcm.errors import OptionError, RunError

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
NAMES = (*RANK_NAMES, "MASTER_ADDR", "MASTER_PORT")
MAX_PORT = 65535
SHOWN = 8  # ranks that a message names


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process: its place among the ranks, and where the store is."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @staticmethod
    def from_environment() -> Launch | None:
        """The launch that the environment describes; None if it describes no ranks.

        Raises:
            OptionError: variables are missing or contradict each other.
        """
        if not any(name in os.environ for name in RANK_NAMES):
            return None
        missing = [name for name in NAMES if not os.environ.get(name)]
        if missing:
            present = [name for name in NAMES if name not in missing]
            raise OptionError(
                f"the environment sets {', '.join(present) or 'no value'} but not "
                f"{', '.join(missing)}. Start the ranks with torchrun, which sets all of them, or "
                f"unset {', '.join(RANK_NAMES)} for a single process"
            )
        rank, size, local_rank, port = (_integer(name) for name in (*RANK_NAMES, "MASTER_PORT"))
        for name, value, low, high in (
            ("WORLD_SIZE", size, 1, None),
            ("RANK", rank, 0, size - 1),
            ("LOCAL_RANK", local_rank, 0, rank),
            ("MASTER_PORT", port, 1, MAX_PORT),
        ):
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"in {low}..{high}"
                raise OptionError(
                    f"the environment variable {name} is {value}; it must be {allowed}. torchrun "
                    "sets it"
                )
        return Launch(rank, size, local_rank, os.environ["MASTER_ADDR"], port)

    @property
    def hosts_store(self) -> bool:
        """Whether this process serves the store. Otherwise torchrun on the first node or rank 0."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(launch: Launch, timeout: float) -> dist.Store:
    """The store of all ranks; rank 0 starts it if torchrun has not.

    Raises:
        RunError: the port is in use, or there is no store within `timeout` seconds.
    """
    return _keys_of_start(_open(launch, timeout, serve=launch.hosts_store))


def connect_again(launch: Launch, timeout: float) -> dist.Store:
    """Another connection to the store of `connect`: operations on one connection queue up."""
    return _keys_of_start(_open(launch, timeout, serve=False))


def join(launch: Launch, store: dist.Store, timeout: float) -> None:
    """Wait until every rank has called this.

    Then the store has the keys that the heartbeat reads: host/RANK, beat/RANK and verdict.

    Raises:
        RunError: ranks are missing after `timeout` seconds, or the ranks were started with
            different environments.
    """
    rank, size = launch.rank, launch.size
    expected = store.compare_set("size", "", str(size)).decode()
    if expected != str(size):
        raise RunError(
            f"rank {rank} was started with WORLD_SIZE={size}, another rank with {expected}; start "
            "all ranks with the same number of nodes and processes"
        )
    if store.add(f"joined/{rank}", 1) > 1:
        raise RunError(f"two processes have RANK={rank}; give every node its own --node-rank")
    if rank == 0:
        store.set("verdict", "")
    store.set(f"host/{rank}", socket.gethostname())
    store.set(f"beat/{rank}", "0")
    if store.add("joined", 1) == size:
        store.set("complete", "")
    deadline = time.monotonic() + timeout
    while not store.check(["complete"]):
        if time.monotonic() > deadline:
            missing = [r for r in range(size) if not store.check([f"host/{r}"])]
            raise RunError(
                f"{len(missing)} of {size} ranks have not started within {timeout:g} s: "
                f"{shortened([str(r) for r in missing])}. Start torchrun on every node, with the "
                "same settings"
            )
        time.sleep(max(0.02, size / 1000))  # at most 1000 requests per second


def shortened(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _keys_of_start(store: dist.Store) -> dist.Store:
    # After a restart by torchrun (--max-restarts) the store may have the keys of the failed start.
    return dist.PrefixStore(f"rcm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _integer(name: str) -> int:
    text = os.environ[name]
    if not re.fullmatch(r"\d{1,9}", text):
        raise OptionError(f"the environment variable {name} is {text!r}; it must be an integer")
    return int(text)


def _open(launch: Launch, timeout: float, *, serve: bool) -> dist.Store:
    """A connection to the store; with serve, the store itself.

    It is opened in a thread, because it waits forever for an answer of another kind of server,
    and longer than its timeout for a connection.
    """
    outcomes: list[dist.Store | RuntimeError] = []

    def open_store() -> None:
        try:
            store = dist.TCPStore(
                launch.address,
                launch.port,
                is_master=serve,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            outcomes.append(error)
        else:
            outcomes.append(store)

    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(timeout)
    outcome = outcomes[0] if outcomes else None
    if isinstance(outcome, dist.Store):
        return outcome
    host = socket.gethostname()
    if "EADDRINUSE" in str(outcome):
        raise RunError(
            f"port {launch.port} on {host} is in use by another program; choose another with "
            "torchrun --master-port (MASTER_PORT)"
        ) from outcome
    if _accepts_connections(launch):
        reason = "another program uses this port, choose another with torchrun --master-port"
    else:
        reason = "nothing answers there, start torchrun on the master node"
    raise RunError(
        f"rank {launch.rank} on {host} found no store of the run at {launch.address}:{launch.port} "
        f"(MASTER_ADDR, MASTER_PORT) within {timeout:g} s: {reason}"
    ) from outcome


def _accepts_connections(launch: Launch) -> bool:
    try:
        socket.create_connection((launch.address, launch.port), timeout=1).close()
    except OSError:
        return False
    return True
