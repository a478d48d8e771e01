"""End all ranks within a minute when one of them dies, is stopped or fails, and say which one.

Without this, ranks wait in a collective for a rank that is gone until the timeout of the
collective, which is long. A thread of each rank writes and reads keys of the rendezvous store:

    beat/RANK   a counter that the rank advances every `interval`; "left" after its normal end
    host/RANK   its machine, for messages
    verdict     why the run ends, empty while it goes well; the first failure wins
    left        how many ranks have ended, or have read the verdict

Rank 0 watches all ranks; the others watch rank 0 and the verdict. So a poll is one write and one
read on each rank, and only the read of rank 0 grows with the number of ranks. Silence is counted in
polls instead of seconds: a rank that was suspended itself blames nobody for the gap.

The thread needs Python's global interpreter lock. Operations of PyTorch release it, and compilation
and loading give it up between two bytecodes. A C++ function that holds it for longer than `timeout`
silences its rank, which then counts as dead. A rank that waits without the lock, such as for a disk
or a GPU, goes on beating: the others wait for it until the timeout of the collective.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from rcm.distributed.rendezvous import shortened

LEFT = b"left"
MAX_MESSAGE = 1000  # characters of a failure


@dataclass(frozen=True, kw_only=True)
class HeartbeatConfig:
    """How often ranks give a sign of life, and when they count as dead."""

    interval: float = 3.0
    """Seconds between two beats."""
    timeout: float = 30.0
    """Seconds without a beat after which a rank counts as dead."""

    @property
    def verdict_time(self) -> float:
        """Seconds within which all ranks know that one is dead."""
        return self.timeout + 4 * self.interval

    @property
    def notice_time(self) -> float:
        """Seconds within which all ranks have read a verdict."""
        return 2 * self.interval


class _Silence:
    """Counts the polls since a value last changed."""

    def __init__(self) -> None:
        self.last: bytes | int | None = None
        self.polls = 0

    def after(self, value: bytes | int) -> int:
        self.polls = self.polls + 1 if value == self.last else 0
        self.last = value
        return self.polls


class Heartbeat:
    """The heartbeat of one rank. All ranks have joined (rendezvous.join) before it starts."""

    def __init__(self, store: dist.Store, rank: int, size: int, config: HeartbeatConfig) -> None:
        """The store is a connection of its own, which nothing else uses."""
        self._store, self._rank, self._size, self._config = store, rank, size, config
        self._watched = {r: _Silence() for r in (range(1, size) if rank == 0 else (0,))}
        self._polls = 0
        self._failure: str | None = None
        self._reports_failure = True
        self._wake, self._leaving, self._finished = (threading.Event() for _ in range(3))

    def start(self) -> None:
        self._hosts = [
            host.decode()
            for host in self._store.multi_get([f"host/{r}" for r in range(self._size)])
        ]
        for target in (self._talk, self._watch_store):
            threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True).start()

    @property
    def name(self) -> str:
        """This rank in messages: "rank 3 on host"."""
        return self._name(self._rank)

    def leave(self) -> None:
        """End normally. Rank 0 returns after all others have ended: its process may be the store's.

        Raises nothing, but ends the process if another rank fails meanwhile.
        """
        self._leave()
        self._finished.wait()

    def fail(self, message: str) -> bool:
        """Tell all ranks that this one failed; they end. Whether this rank shall print its failure.

        Another rank may have failed before: with the same message, then that rank prints it, or
        with another message, then this ends the process.
        """
        self._failure = " ".join(message.split())[:MAX_MESSAGE]
        self._leave()
        self._finished.wait(2 * self._config.notice_time)  # the store may be gone
        return self._reports_failure

    def await_verdict(self) -> None:
        """Wait while the run may still learn which rank died: the verdict ends the process."""
        self._finished.wait(self._config.verdict_time)

    def _leave(self) -> None:
        self._leaving.set()
        self._wake.set()

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _talk(self) -> None:
        try:
            while not self._leaving.is_set():
                self._poll()
                self._wake.wait(self._config.interval)
            if self._failure is None:
                self._leave_normally()
            else:
                self._publish_failure(self._failure)
        except RuntimeError:  # of the store: torch.distributed.DistError and its relatives
            if self._failure is None:
                self._end(
                    f"the connection to the store of the run was lost: rank 0 or torchrun on "
                    f"{self._hosts[0]} has ended, and its log says why"
                )
        finally:
            self._finished.set()

    def _poll(self) -> None:
        """Beat once, and look at the verdict and at the watched ranks."""
        self._polls += 1
        self._store.set(f"beat/{self._rank}", str(self._polls))
        keys = [f"beat/{rank}" for rank in self._watched]
        verdict, *beats = self._store.multi_get(["verdict", *keys])
        if verdict:
            # This rank may be about to raise the same error: it then reports nothing more.
            if self._leaving.wait(self._config.interval) and self._failure is not None:
                return
            self._end(verdict.decode())
        dead = [
            rank
            for (rank, silence), beat in zip(self._watched.items(), beats, strict=True)
            if beat != LEFT and self._is_too_long(silence.after(beat))
        ]
        if dead:
            self._end(
                self._decide(
                    f"no heartbeat for {self._config.timeout:g} s of "
                    f"{shortened([self._name(rank) for rank in dead])}: the process was killed or "
                    "hangs, or its machine or network failed"
                )
            )

    def _is_too_long(self, polls: int) -> bool:
        return polls * self._config.interval >= self._config.timeout

    def _decide(self, verdict: str) -> str:
        """Publish a verdict; return the one that counts."""
        return self._store.compare_set("verdict", "", verdict).decode()

    def _leave_normally(self) -> None:
        if self._rank > 0:
            self._store.set(f"beat/{self._rank}", LEFT.decode())
            self._store.add("left", 1)
            return
        self._store.add("left", 1)
        while not self._all_left(within=self._config.interval):
            self._poll()
        self._poll()  # the last one may have failed

    def _publish_failure(self, message: str) -> None:
        mine = f"{self.name} failed: {message}"
        verdict = self._decide(mine)
        if not verdict.endswith(f" failed: {message}"):
            self._end(verdict)
        self._reports_failure = verdict == mine
        self._store.add("left", 1)
        # When this process ends, the store may end too: the others shall have read it before.
        self._all_left(within=self._config.notice_time)

    def _all_left(self, *, within: float) -> bool:
        deadline = time.monotonic() + within
        while self._store.add("left", 0) < self._size:
            if time.monotonic() > deadline:
                return False
            time.sleep(min(0.1, within))
        return True

    def _watch_store(self) -> None:
        """End the process if an operation of the store hangs, as it does if its machine fails."""
        silence = _Silence()
        while not self._finished.wait(self._config.interval):
            if self._is_too_long(silence.after(self._polls)):
                self._print(
                    f"the store of the run has not answered for {self._config.timeout:g} s: rank 0 "
                    f"or torchrun on {self._hosts[0]} hangs, or its machine or network failed"
                )
                os._exit(1)

    def _end(self, verdict: str) -> None:
        """Print the verdict and end the process, whose main thread may hang in a collective."""
        self._print(verdict)
        try:
            self._store.add("left", 1)
            # Let a failed rank end first, so that torchrun names it, and the others read the
            # verdict before torchrun ends the store.
            time.sleep(self._config.notice_time)
        except RuntimeError:
            pass  # the store is gone
        os._exit(1)

    def _print(self, verdict: str) -> None:
        # Unbuffered: the main thread may hold the lock of sys.stderr.
        os.write(2, f"error: {verdict} ({self.name} ends)\n".encode())
