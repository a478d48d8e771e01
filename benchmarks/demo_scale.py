"""A run that two ranks start, that is killed, and that one process finishes: `make demo-scale`.

    python benchmarks/demo_scale.py [--iterations 20] [--folder FOLDER]

1. One process trains the preset `wan-tiny` without a disturbance.
2. Two ranks of torchrun train it under FSDP2 and Ulysses. They are killed (kill -9) in the middle.
3. One process continues their folder from the last checkpoint.

The table compares the loss of every iteration. The exit status is 1 if one differs by more than
1e-5.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOLERANCE = 1e-5
CHECKPOINT_EVERY = 5
RANKS = 2
TRAIN = ("-m", "rcm.train", "wan-tiny")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20, help="at least 10")
    parser.add_argument("--folder", type=Path, help="keep the two run folders here")
    options = parser.parse_args()
    if options.iterations < 2 * CHECKPOINT_EVERY:
        parser.error(f"--iterations must be at least {2 * CHECKPOINT_EVERY}")
    if options.folder is not None:
        return demo(options.folder, options.iterations)
    with tempfile.TemporaryDirectory() as folder:
        return demo(Path(folder), options.iterations)


def demo(folder: Path, iterations: int) -> int:
    """Do the runs in two new folders; return the exit status."""
    one, two = folder / "one-process", folder / "killed"
    if existing := [path for path in (one, two) if path.exists()]:
        print(f"error: {existing[0]} exists; choose another --folder", file=sys.stderr)
        return 2
    settings = [f"--student.iterations={iterations}", f"--checkpoint-every={CHECKPOINT_EVERY}"]

    print("1. One process, undisturbed", flush=True)
    run_alone(one, settings)
    print(f"\n2. {RANKS} ranks with FSDP2 and Ulysses, killed in the middle", flush=True)
    killed_at = run_and_kill(two, settings, after=iterations // 2 + 2)
    print(f"killed after iteration {killed_at}", flush=True)
    print("\n3. One process continues", flush=True)
    resumed_at = run_alone(two, settings)

    print(f"\nIterations 1 to {resumed_at} are those of {RANKS} ranks.\n")
    return compare(losses(two), losses(one))


def run_alone(folder: Path, settings: list[str]) -> int:
    """Train or continue in one process; return the iteration at which it started."""
    command = [sys.executable, *TRAIN, "--folder", str(folder), *settings, "--mesh.ulysses=1"]
    found = last_checkpoint(folder)
    subprocess.run(command, env=environment(), check=True)
    return found


def run_and_kill(folder: Path, settings: list[str], *, after: int) -> int:
    """Train on two ranks, and kill them and torchrun after an iteration; return that iteration."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    options = ["--folder", str(folder), *settings, f"--mesh.ulysses={RANKS}"]
    command = [sys.executable, *launcher, *TRAIN, *options]
    process = subprocess.Popen(command, env=environment())
    try:
        while len(losses(folder)) < after or not last_checkpoint(folder):
            if process.poll() is not None:
                raise SystemExit(f"the run of {RANKS} ranks ended by itself")
            time.sleep(0.01)
    finally:
        ranks = children(process.pid)
        process.kill()
        process.wait()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    with open(folder / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which rank 0 held until it was gone
    return len(losses(folder))


def children(pid: int) -> list[int]:
    """The process ids of the children of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def last_checkpoint(folder: Path) -> int:
    """The iteration of the last complete checkpoint, or 0."""
    paths = (folder / "checkpoints").glob("student-*")
    return max((int(path.name.partition("-")[2]) for path in paths), default=0)


def losses(folder: Path) -> list[tuple[str, float]]:
    """The network that each iteration trained, and its loss."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = []
    for line in map(json.loads, (line for line in lines if line.endswith("\n"))):
        name = "loss" if "loss" in line else "critic_loss"
        found.append(("student" if name == "loss" else "critic", line[name]))
    return found


def compare(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> int:
    """Print the table of all losses; return the exit status."""
    print(f"iteration  network  {RANKS} ranks, then 1  one process  difference")
    differences = []
    for i, ((name, loss), (_, reference)) in enumerate(zip(found, expected, strict=True)):
        difference = abs(loss - reference) / abs(reference)
        print(f"{i + 1:9}  {name:7}  {loss:15.6f}  {reference:11.6f}  {difference:10.1e}")
        differences.append(difference)
    is_close = all(difference <= TOLERANCE for difference in differences)  # false for NaN
    limit = f"{'at most' if is_close else 'MORE than'} {TOLERANCE:.0e}"
    print(f"\nThe largest relative difference is {max(differences):.1e}, {limit}.")
    return 0 if is_close else 1


def environment() -> dict[str, str]:
    """One thread for each process, without torchrun's note about it."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
