"""Writes the table of benchmarks/hopper.md, from the kernel table and the compiler's report:

python tests/compile_gate/hopper_table.py
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from jvp_attn.kernel_table import KERNELS, KernelEntry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = BENCHMARKS / "hopper.md"
REPORT = BENCHMARKS / "results" / "kernel-registers-sm_90a.json"
BETWEEN_MARKERS = re.compile(r"(?<=hopper_table.py -->\n).*(?=<!-- end -->\n)", re.DOTALL)

HOPPER = [x for x in KERNELS.values() if x.arch == "sm90" and x.element == "bf16"]
PANEL_COLUMNS = 64
COLUMNS_OF_A_SUM = 8  # the fewest that a product has
BYTES_A_CYCLE = 128  # that shared memory moves
MULTIPLY_ADDS_A_CYCLE = 2048  # of 2-byte elements, on a multiprocessor


@dataclass(frozen=True)
class Schedule:
    """What a kernel does with a tile of scores.

    Attributes:
        scores: products whose left factor is a tile in shared memory; there are scores of rows and
            keys.
        results: products whose left factor is in registers; they add to outputs or gradients.
        streamed: tiles that arrive for it; the others stay.
        kept: 16-byte accesses of each thread to what it keeps in shared memory for itself.
        handed_over: matrices of float32 scores that a warpgroup writes and another reads.
        shared: products whose left factor, rounded scores, goes from all warpgroups to all through
            shared memory; with the sums of its rows. Each has 64 rows and 64 columns of the result.
    """

    scores: int
    results: int
    streamed: int
    kept: int = 0
    handed_over: int = 0
    shared: int = 0


SCHEDULES = {
    "forward": Schedule(1, 1, 2),
    "forward_tangent": Schedule(3, 3, 4),
    "forward_query_tangent": Schedule(2, 2, 2),
    "tangent_given_forward": Schedule(3, 2, 4),
    "backward": Schedule(2, 2, 2, shared=1),
    "backward_dq": Schedule(2, 1, 2, kept=4),
    "backward_dkv": Schedule(2, 2, 2),
    "tangent_backward_dq": Schedule(6, 3, 4, kept=8),
    "tangent_backward_dkv": Schedule(6, 6, 4, handed_over=2),
}


def tensor_core_cycles(kernel: KernelEntry) -> int:
    """For all the products of a tile."""
    (rows, keys), schedule = tile_of(kernel), SCHEDULES[kernel.step]
    columns = (schedule.scores + schedule.results) * head_dim_of(kernel)
    columns += schedule.shared * (panels_of(kernel) * PANEL_COLUMNS + COLUMNS_OF_A_SUM)
    return columns * rows * keys // MULTIPLY_ADDS_A_CYCLE


def shared_memory_cycles(kernel: KernelEntry) -> int:
    """For factors, tiles that arrive, and what threads keep there or hand over."""
    (rows, keys), schedule = tile_of(kernel), SCHEDULES[kernel.step]
    row_bytes = 2 * head_dim_of(kernel)
    in_panels = panels_of(kernel) * 2 * PANEL_COLUMNS
    # Each warpgroup has 64 rows, or 64 keys, and reads all of the tile that streams by.
    keys_stay = "dkv" in kernel.step or kernel.step == "backward"
    stays, streams = (keys, rows) if keys_stay else (rows, keys)
    warpgroups = stays // 64
    left, right = stays * row_bytes, warpgroups * streams * row_bytes
    moved = schedule.scores * (left + right) + schedule.results * right
    moved += schedule.streamed * streams * in_panels
    moved += schedule.kept * 16 * 128 * warpgroups
    moved += schedule.handed_over * 2 * 4 * rows * keys
    # Written; read by each warpgroup for its product, and once more for the sums; right factors.
    scores = 2 * keys * (rows + warpgroups * 64 + rows)
    moved += schedule.shared * (scores + 2 * keys * warpgroups * PANEL_COLUMNS)
    moved += schedule.shared * 2 * keys * rows // 64 * COLUMNS_OF_A_SUM
    return moved // BYTES_A_CYCLE


def panels_of(kernel: KernelEntry) -> int:
    """Of 64 columns each."""
    return -(-head_dim_of(kernel) // PANEL_COLUMNS)


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
        *("MUFU", "tensor cores", "shared memory", "quotient", "TFLOP/s"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kernel in HOPPER:
        found, (rows, keys) = compiled[kernel.name], tile_of(kernel)
        tensor_cores, shared_memory = tensor_core_cycles(kernel), shared_memory_cycles(kernel)
        cells = (
            *(kernel.step, kernel.head_dim, f"{rows}×{keys}", found["registers"]),
            *(found["shared_bytes"], found["loop_total"], found["loop_hgmma"], found["loop_mufu"]),
            *(tensor_cores, shared_memory, f"{shared_memory / tensor_cores:.2f}"),
            "not yet measured",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(["", *lines, "", ""])


def with_table(page: str) -> str:
    """The text with the table between its markers."""
    text, found = BETWEEN_MARKERS.subn(lambda _: table(), page)
    if found != 1:
        raise ValueError(f"{PAGE} has {found} places for the table, not one")
    return text


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
