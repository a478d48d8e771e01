"""Start the ranks of a training run: by torchrun, or quickly from a fork server."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rcm.distributed.heartbeat import HeartbeatConfig
from tests.distributed.launched_ranks import ROOT, free_port

LIMIT = 600.0  # seconds after which a test gives up, on a busy machine
QUICK = HeartbeatConfig(interval=0.2, timeout=2)
PROGRAM = "tests.distributed.training_program"


def _allow_interrupts() -> None:
    """A shell that started the tests in the background made their processes ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ForkedRanks:
    """Ranks of training_program, with the environment of torchrun. The output goes to a file."""

    def __init__(self, arguments: list[str], output: Path, *, soon: bool = False) -> None:
        """soon: a dead rank ends the others within seconds. A slow one may do so too."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PROGRAM])
        port = free_port()
        self.output = output
        self.processes: list[Any] = []
        for rank in (0, 1):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            given = (variables, output, arguments, QUICK if soon else None)
            self.processes.append(context.Process(target=_run_rank, args=given))
            self.processes[-1].start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def has_ended(self) -> bool:
        return any(process.exitcode is not None for process in self.processes)

    def codes(self) -> list[int]:
        """The exit code of each rank, -N after signal N; raises TimeoutError if one hangs."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill(0, 1)
            raise TimeoutError(f"exit codes {codes}: {self.output.read_text()}")
        return codes


def _run_rank(
    variables: dict[str, str],
    output: Path,
    arguments: list[str],
    heartbeat: HeartbeatConfig | None,
) -> None:
    from tests.distributed.training_program import main

    os.environ.update(variables)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = main(arguments, heartbeat)
    sys.stdout.flush()
    sys.exit(code)


class TorchrunRanks:
    """Ranks of a module under torchrun. The output goes to a file."""

    def __init__(self, module: str, arguments: list[str], output: Path, *options: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node=2"]
        self.output = output
        with output.open("a") as file:
            self.process = subprocess.Popen(
                [*launcher, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_allow_interrupts,
            )

    @property
    def pids(self) -> list[int]:
        """The ranks that run now, in their order."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = sorted(int(child) for task in tasks for child in task.read_text().split())
        return [pid for pid in found if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]

    def kill(self, *ranks: int) -> None:
        """Kill ranks; torchrun too, and before them, if all shall die."""
        pids = self.pids
        if len(ranks) == 2:
            self.process.kill()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(pids[rank], signal.SIGKILL)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def codes(self) -> list[int]:
        """The exit code of torchrun; raises TimeoutError if it hangs."""
        try:
            return [self.process.wait(LIMIT)]
        except subprocess.TimeoutExpired as error:
            self.kill(0, 1)
            raise TimeoutError(self.output.read_text()) from error


def iterations(folder: Path) -> int:
    """The number of iterations that a run has written to its metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finished_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a run, by iteration."""
    paths = (folder / "checkpoints").glob("student-*")
    return {int(path.name.partition("-")[2]): path for path in paths}
