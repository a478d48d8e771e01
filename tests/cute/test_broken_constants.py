"""One wrong constant in csrc, and CuTe disagrees."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compile_gate.cuda_tools import ROOT
from tests.cute.checks import Check
from tests.cute.cute_build import compare, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.xdist_group("cute"),
]


@dataclass(frozen=True)
class Break:
    """A text of csrc that is replaced, and the checks that find it."""

    name: str
    file: str
    text: str
    replacement: str
    found_by: tuple[Check, ...]


def sm90(what: str, *sizes: int) -> Check:
    return Check("sm90", what, sizes)


def sm80(what: str, *sizes: int) -> Check:
    return Check("sm80", what, sizes)


COLUMNS = sm90("columns", 128, 128)
ROWS = sm90("rows", 128, 128)
ADDRESSES = sm90("addresses", 128, 128)
SCORES = sm90("multiply_transposed", 64, 64, 128)
VALUES = sm90("multiply", 64, 128)
TWO_TILES = sm90("two_tiles", 128, 12)
VALUES_AND_SUMS = sm90("multiply_two_tiles", 128)
LEFT_TRANSPOSED = sm90("multiply_left_transposed", 128, 128)
ACCUMULATOR = sm90("accumulator", 64)
PACKED = sm90("packed", 64)
STAGING = sm90("staging", 64, 64)
MAPS = sm90("tensor_maps", 128, 128)
BOXES = sm90("boxes", 128, 128)
SWIZZLE = sm80("swizzle", 64, 128)
SWIZZLE_OF_96 = sm80("swizzle", 64, 96)
FRAGMENTS = sm80("fragments", 64, 128)
MMA_SCORES = sm80("mma_multiply_transposed", 64, 64, 128)
MMA_VALUES = sm80("mma_multiply", 64, 128)

TILE = "sm90/tile.cuh"
MAP = "sm90/ptx.cuh"
FRAGMENT = "common/fragment.cuh"

BREAKS = [
    # Matrix descriptors
    Break("lbo_k_major", TILE, "kPanelRowBytes, 16, kSw", "kPanelRowBytes, 32, kSw", (COLUMNS,)),
    Break("lbo_mn_major", TILE, "= kPanelBytes) const", "= kPanelBytes / 2) const", (ROWS, VALUES)),
    Break("sbo", TILE, "kSwizzleBytes = 1024", "kSwizzleBytes = 2048", (COLUMNS, ROWS, SCORES)),
    Break("lbo_shift", TILE, "leading >> 4) << 16", "leading >> 4) << 17", (COLUMNS, ROWS)),
    Break("swizzle_mode", TILE, "uint64_t{1} << 62", "uint64_t{2} << 62", (COLUMNS, SCORES)),
    Break("step_of_columns", TILE, "step % 4 * 32", "step % 4 * 64", (COLUMNS, SCORES)),
    Break("step_of_rows", TILE, "(step * 16 *", "(step * 8 *", (ROWS, VALUES)),
    Break(
        "second_tile", TILE, "ones.base - b.base", "ones.base", (LEFT_TRANSPOSED, VALUES_AND_SUMS)
    ),
    # Tiles in shared memory
    Break("panel_bytes", TILE, "= Rows * kPanelRow", "= (Rows + 8) * kPanelRow", (ADDRESSES, ROWS)),
    Break("swizzle", TILE, "% 8 ^ row % 8", "% 8 ^ row / 2 % 4", (ADDRESSES, STAGING)),
    Break("sm80_swizzle", "sm80/tile.cuh", "? row % 8", "? row % 4", (SWIZZLE,)),
    Break("sm80_swizzle_of_96", "sm80/tile.cuh", "row / 2 % 4", "row % 4", (SWIZZLE_OF_96,)),
    # Fragments
    Break("accumulator_column", FRAGMENT, "+ 2 * (lane", "+ 1 * (lane", (ACCUMULATOR, SCORES)),
    Break("accumulator_row", FRAGMENT, "4 + 8 * half", "4 + 4 * half", (ACCUMULATOR, MMA_SCORES)),
    Break(
        "accumulator_order",
        FRAGMENT,
        "& at(int block, int half, int side) { return value[block][2 * half + side]",
        "& at(int block, int half, int side) { return value[block][2 * side + half]",
        (ACCUMULATOR, SCORES, MMA_SCORES),
    ),
    Break(
        "packed_order",
        FRAGMENT,
        "block % 2 * 2 + half] = pack",
        "half * 2 + block % 2] = pack",
        (PACKED, VALUES, MMA_VALUES),
    ),
    Break("staging_rows", "sm90/epilogue.cuh", "+ lane % 16, 2", "+ lane % 8, 2", (STAGING,)),
    Break("sm80_right", "sm80/tile.cuh", "lane / 8 % 2)", "lane / 16)", (FRAGMENTS, MMA_SCORES)),
    # TMA
    Break("box_columns", MAP, "box[4] = {64", "box[4] = {32", (MAPS,)),
    Break("map_swizzle", MAP, "MAP_SWIZZLE_128B", "MAP_SWIZZLE_64B", (MAPS,)),
    Break(
        "map_strides",
        "sm90/tensor_map.h",
        "key.sizes[1], x.row_stride",
        "key.sizes[1], x.head_stride",
        (MAPS,),
    ),
    Break("box_of_panel", "sm90/pipeline.cuh", "panel * kPanelColumns", "panel * 32", (BOXES,)),
]


def break_csrc(folder: Path, broken: Break) -> None:
    """Copy csrc, with one change."""
    shutil.copytree(ROOT / "csrc", folder)
    path = folder / broken.file
    source = path.read_text()
    assert source.count(broken.text) == 1, f"{broken.text!r} is not once in {broken.file}"
    path.write_text(source.replace(broken.text, broken.replacement))


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_cute_finds_a_wrong_constant(broken: Break, tmp_path: Path) -> None:
    break_csrc(tmp_path / "csrc", broken)
    results = compare(broken.found_by, tmp_path / "csrc", tmp_path)
    assert set(results) == {check.name for check in broken.found_by}
    assert all(result.differences > 0 for result in results.values()), results
