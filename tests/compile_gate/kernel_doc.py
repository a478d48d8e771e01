"""Writes the table of sm90 kernels in docs/kernels.md from the kernel table and ptxas' report:

python -m tests.compile_gate.kernel_doc
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
REPORT = ROOT / "benchmarks" / "results" / "kernel-registers-sm_90a.json"
TABLE = re.compile(
    r"(<!-- python -m tests\.compile_gate\.kernel_doc -->\n).*?(<!-- end -->\n)", re.DOTALL
)

HOPPER = [x for x in KERNELS.values() if x.arch == "sm90" and x.element == "bf16"]
PANEL_COLUMNS = 64
SUM_COLUMNS = 8  # of ones beside a right operand: a product with them is the row sums
SHARED_COLUMNS = PANEL_COLUMNS + SUM_COLUMNS
BYTES_PER_CYCLE = 128  # of shared memory
MULTIPLY_ADDS_PER_CYCLE = 2048  # of 2-byte elements, per multiprocessor


@dataclass(frozen=True)
class Schedule:
    """The work of a kernel on one tile of scores.

    Attributes:
        scores: products whose left operand is in shared memory; their result is rows x keys.
        results: products whose left operand is in registers; they add to outputs or gradients.
        streamed: tiles that are loaded for it; the others stay for the whole loop.
        kept: 16-byte accesses of each thread to its own data in shared memory.
        exchanged: float32 tiles of scores that one warpgroup writes and another reads.
        shared: products whose left operand, rounded scores, passes from all warpgroups to all
            through shared memory. Each has 64 rows and 64 columns of the result, and 8 columns
            of row sums.
        summed: the head dims at which `results` have 8 columns of row sums too.
    """

    scores: int
    results: int
    streamed: int
    kept: int = 0
    exchanged: int = 0
    shared: int = 0
    summed: Collection[int] = ()


SCHEDULES = {
    "forward": Schedule(1, 1, 2),
    "forward_jvp": Schedule(3, 3, 4),
    "forward_jvp_q": Schedule(2, 2, 2),
    "tangent_only": Schedule(3, 2, 4),
    "backward": Schedule(2, 2, 2, shared=1),
    "backward_dq": Schedule(2, 1, 2, kept=2, summed=(64,)),
    "backward_dkv": Schedule(2, 2, 2),
    "jvp_backward_dq": Schedule(6, 3, 4, kept=8),
    "jvp_backward_dkv": Schedule(6, 6, 4, exchanged=2),
}


def tensor_core_cycles(kernel: KernelEntry) -> int:
    """Cycles of all products of a tile."""
    (rows, keys), schedule = tile_of(kernel), SCHEDULES[kernel.step]
    multiply_adds = (schedule.scores + schedule.results) * rows * keys * head_dim_of(kernel)
    if kernel.head_dim in schedule.summed:
        multiply_adds += schedule.results * rows * keys * SUM_COLUMNS
    multiply_adds += schedule.shared * warpgroups_of(kernel) * 64 * keys * SHARED_COLUMNS
    return multiply_adds // MULTIPLY_ADDS_PER_CYCLE


def shared_memory_cycles(kernel: KernelEntry) -> int:
    """Cycles for operands, loaded tiles, and the data that threads keep or exchange there."""
    (rows, keys), schedule = tile_of(kernel), SCHEDULES[kernel.step]
    row_bytes = 2 * head_dim_of(kernel)
    in_panels = -(-row_bytes // (2 * PANEL_COLUMNS)) * 2 * PANEL_COLUMNS
    # Each warpgroup owns 64 rows, or 64 keys, and reads the whole streamed tile.
    stays, streams = (keys, rows) if keys_stay(kernel) else (rows, keys)
    warpgroups = warpgroups_of(kernel)
    left, right = stays * row_bytes, warpgroups * streams * row_bytes
    moved = schedule.scores * (left + right) + schedule.results * right
    if kernel.head_dim in schedule.summed:
        moved += schedule.results * warpgroups * streams * 2 * SUM_COLUMNS
    moved += schedule.streamed * streams * in_panels
    moved += schedule.kept * 16 * 128 * warpgroups
    moved += schedule.exchanged * 2 * 4 * rows * keys
    # Written once and read by each warpgroup, with the right operands.
    moved += schedule.shared * 2 * keys * (rows + warpgroups * (64 + SHARED_COLUMNS))
    return moved // BYTES_PER_CYCLE


def keys_stay(kernel: KernelEntry) -> bool:
    """Whether warpgroups own keys and rows are streamed."""
    return kernel.step == "backward" or "dkv" in kernel.step


def warpgroups_of(kernel: KernelEntry) -> int:
    """The number of warpgroups that multiply."""
    rows, keys = tile_of(kernel)
    return (keys if keys_stay(kernel) else rows) // 64


def tile_of(kernel: KernelEntry) -> tuple[int, int]:
    assert kernel.tile is not None
    return kernel.tile


def head_dim_of(kernel: KernelEntry) -> int:
    assert kernel.head_dim is not None
    return kernel.head_dim


def table() -> str:
    compiled = json.loads(REPORT.read_text("utf-8"))["kernels"]
    heads = (
        *("kernel", "head dim", "tile", "registers", "shared memory", "instructions", "HGMMA"),
        *("exponentials", "overlapped", "tensor cores", "shared memory", "quotient"),
        *("tensor cores busy, predicted", "TFLOP/s"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kernel in HOPPER:
        found, (rows, keys) = compiled[kernel.name], tile_of(kernel)
        tensor_cores, shared_memory = tensor_core_cycles(kernel), shared_memory_cycles(kernel)
        cells = (
            *(kernel.step, kernel.head_dim, f"{rows}×{keys}", found["registers"]),
            *(found["shared_bytes"], found["loop_instructions"], found["loop_hgmma"]),
            *(found["loop_exponentials"], found["loop_overlapped"]),
            *(tensor_cores, shared_memory, f"{shared_memory / tensor_cores:.2f}"),
            *(prediction(kernel, found["busy_percent"]), "not yet measured"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["", *lines, "", ""])


def prediction(kernel: KernelEntry, busy_percent: int | None) -> str:
    """How long the tensor cores are busy; the model behind the number knows no shared memory."""
    if busy_percent is None:
        return "not predicted"
    limit = 100 * tensor_core_cycles(kernel) / shared_memory_cycles(kernel)
    return f"{min(busy_percent, round(limit))} %"


def with_table(page: str) -> str:
    """The page with an up-to-date table between its markers."""
    text, found = TABLE.subn(lambda markers: markers[1] + table() + markers[2], page)
    if found != 1:
        raise ValueError(f"{PAGE} has {found} pairs of markers for the table, not one")
    return text


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
