"""Speed of all four primitives on a CPU, compared with torch's attention and a matrix product.

    python benchmarks/attention_on_cpu.py [--problems 4k-d64 cross] [--repeats 5] [--out FOLDER]

Float32, batch 1, 8 heads. The contenders and the matrix product run in turn, so that a slowdown of
the computer affects all of them; times are medians. contenders.py defines the number of floating
point operations, the same for every contender. Peak memory is measured in a fresh process, beyond
the inputs. OMP_NUM_THREADS sets the number of threads. Writes attention-cpu-primitives.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention import proc_bytes
from contenders import CONTENDERS, OPERATIONS, Inputs, call_of
from environment import environment

MATMUL = 4096


@dataclass(frozen=True)
class Problem:
    """The sizes of a problem with batch 1."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int = 64
    heads: int = 8

    @property
    def scores(self) -> int:
        """The number of scores of all heads."""
        return self.heads * self.seqlen_q * self.seqlen_k

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        lengths = 2 * [self.seqlen_q, self.seqlen_k, self.seqlen_k] + 2 * [self.seqlen_q]
        sizes = [(1, length, self.heads, self.head_dim) for length in lengths]
        tensors = [torch.randn(size, generator=generator) for size in sizes]
        return Inputs(tuple(tensors[:3]), tuple(tensors[3:6]), tuple(tensors[6:]), causal=False)


PROBLEMS = {
    "4k-d64": Problem(4096, 4096),
    "4k-d128": Problem(4096, 4096, 128),
    "256": Problem(256, 256),
    "cross": Problem(4096, 77),
}
NAMES = ("jvp_attn", "torch SDPA (MATH)", "torch SDPA (flash)")
# For the backward through a tangent torch keeps a dozen matrices of scores in memory.
MAX_SCORES = {"backward of both": 2**26}
MEMORY_SEQLEN = 65536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", choices=OPERATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory_here(options.memory_of))
        return
    result: dict[str, Any] = {**environment(), "matmul": MATMUL, "rows": []}
    print(f"{result['device']}, {result['threads']} threads, float32, B1 H8")
    for name in options.problems:
        for operation in OPERATIONS:
            row = measure(name, operation, options.repeats)
            result["rows"].append(row)
            print_row(row)
    result["peak_bytes"] = {x: measured_peak(x) for x in OPERATIONS}
    for operation, peak in result["peak_bytes"].items():
        print(f"N = {MEMORY_SEQLEN}, {operation}: {peak / 2**20:.0f} MiB beyond the inputs")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "attention-cpu-primitives.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def measure(name: str, operation: str, repeats: int) -> dict[str, Any]:
    """Time the contenders and the matrix product in turn; the first round is a warm-up."""
    problem = PROBLEMS[name]
    inputs, matrix = problem.inputs(), torch.randn(MATMUL, MATMUL)
    calls: dict[str, Callable[[], Any]] = {"matmul": lambda: matrix @ matrix}
    for contender in NAMES:
        attention, operations = CONTENDERS[contender]
        is_too_large = contender != "jvp_attn" and problem.scores > MAX_SCORES.get(
            operation, problem.scores
        )
        if operation in operations and not is_too_large:
            calls[contender] = call_of(operation, attention, inputs)
    samples: dict[str, list[float]] = {x: [] for x in calls}
    for _ in range(repeats + 1):
        for x, call in calls.items():
            start = time.perf_counter()
            call()
            samples[x].append(time.perf_counter() - start)
    seconds = {x: times[1:] for x, times in samples.items()}
    work = OPERATIONS[operation] * problem.scores * problem.head_dim
    rates = {x: work / statistics.median(times) / 1e9 for x, times in seconds.items()}
    rates["matmul"] = 2 * MATMUL**3 / statistics.median(seconds["matmul"]) / 1e9
    return {"problem": name, "operation": operation, "seconds": seconds, "gflops": rates}


def print_row(row: dict[str, Any]) -> None:
    matmul = row["gflops"]["matmul"]
    print(f"\n{row['problem']}, {row['operation']}: matmul {matmul:.0f} GFLOP/s")
    for name, rate in row["gflops"].items():
        median = statistics.median(row["seconds"][name])
        print(f"  {name:18s} {1e3 * median:9.1f} ms {rate:7.1f} GFLOP/s, {rate / matmul:.2f} of it")


def measured_peak(operation: str) -> float:
    command = [sys.executable, __file__, "--memory-of", operation]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_memory_here(operation: str) -> float:
    """Peak bytes for one head beyond the inputs and, for a backward, the outputs."""
    attention, _ = CONTENDERS["jvp_attn"]
    call_of(operation, attention, Problem(64, 64).inputs())()  # libraries
    long = Problem(MEMORY_SEQLEN, MEMORY_SEQLEN, heads=1)
    call = call_of(operation, attention, long.inputs())
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = proc_bytes("/proc/self/status", "VmRSS")
    call()
    return proc_bytes("/proc/self/status", "VmHWM") - before


if __name__ == "__main__":
    main()
