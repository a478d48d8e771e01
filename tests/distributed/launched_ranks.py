"""Start rank_program: by torchrun, or quickly from a server process that has imported torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds after which a test gives up, on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Ranks:
    """Ranks without torchrun, as other launchers start them: rank 0 has the store."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: list[Any] = field(default_factory=list)

    def start(
        self,
        action: str,
        size: int = 2,
        *,
        ranks: tuple[int, ...] | None = None,
        device: str = "cpu",
        start_timeout: float = LIMIT,
    ) -> None:
        """Start `ranks`, by default all of them."""
        self.folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.rank_program"])
        for rank in range(size) if ranks is None else ranks:
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
            output = str(self.folder / f"{len(self.processes)}.err")
            arguments = (variables, output, action, self.folder, device, start_timeout)
            self.processes.append(context.Process(target=_run_rank, args=arguments))
        for process in self.processes:
            process.start()

    def wait_until_running(self) -> None:
        wait_for_files(self.folder, len(self.processes))

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def codes(self) -> list[int]:
        """The exit codes of the ranks, -N after signal N; raises TimeoutError if one hangs."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            raise TimeoutError(f"exit codes {codes}, output {self.errors()}")
        return codes

    def errors(self) -> list[str]:
        """What each rank printed on stderr, without the notes of torch and gloo."""
        return [
            "".join(
                line
                for line in (self.folder / f"{i}.err").read_text().splitlines(keepends=True)
                if line.startswith(("error:", "Traceback", "ZeroDivisionError", "RuntimeError"))
            )
            for i in range(len(self.processes))
        ]

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _run_rank(
    variables: dict[str, str],
    output: str,
    action: str,
    folder: Path,
    device: str,
    start_timeout: float,
) -> None:
    from tests.distributed.rank_program import main

    # A shell that started the tests in the background made their processes ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(action, folder, device, start_timeout))


class Torchrun:
    """rank_program under torchrun."""

    def __init__(self, folder: Path, action: str, *options: str, ranks: int = 2) -> None:
        self.folder, self.ranks = folder, ranks
        program = ["-m", "tests.distributed.rank_program", action, str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *program],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_running(self) -> None:
        wait_for_files(self.folder, self.ranks)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"{rank}.pid").read_text())

    def end(self) -> tuple[int, str]:
        """The exit code of torchrun and all that was printed; no rank is left."""
        output, _ = self.process.communicate(timeout=LIMIT)
        for rank in range(self.ranks):
            if (self.folder / f"{rank}.pid").exists():
                assert not is_running(self.pid(rank)), output
        return self.process.returncode, output

    def kill(self) -> None:
        """End what a failed test has left."""
        self.process.kill()
        for path in self.folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def wait_for_files(folder: Path, ranks: int) -> None:
    """Wait until all ranks are inside of the block."""
    deadline = time.monotonic() + LIMIT
    while len(list(folder.glob("*.pid"))) < ranks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ranks} ranks have not started")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
