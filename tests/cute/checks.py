"""What is compared with CuTe: a list made from the kernel table, so that it covers every tile.

Each check is a function template of this folder's headers, with the sizes that a kernel uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry

# What the rows of a step's products are. Tiles of the other stream by.
_ROWS = {
    "forward": "queries",
    "forward_jvp": "queries",
    "forward_jvp_q": "queries",
    "tangent_only": "queries",
    "backward": "keys",
    "backward_dq": "queries",
    "backward_dkv": "keys",
    "jvp_backward_dq": "queries",
    "jvp_backward_dkv": "keys",
}


@dataclass(frozen=True, order=True)
class Check:
    """A comparison of csrc with CuTe: compare_<what><sizes...>."""

    arch: str
    what: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return "-".join((self.arch, self.what, "x".join(map(str, self.sizes))))

    @property
    def call(self) -> str:
        """A statement of the C++ program."""
        return f'run("{self.name}", compare_{self.what}<{", ".join(map(str, self.sizes))}>);'


def checks_of(kernels: Iterable[KernelEntry]) -> list[Check]:
    """The checks of some kernels, without repetitions.

    Raises:
        ValueError: a step is unknown here.
    """
    return sorted({check for kernel in kernels for check in _checks_of(kernel)})


def _checks_of(kernel: KernelEntry) -> Iterator[Check]:
    if kernel.tile is None:
        return
    if kernel.step not in _ROWS:
        raise ValueError(f"add the step {kernel.step} to tests/cute/checks.py: are its rows keys?")
    assert kernel.head_dim is not None
    rows, streamed = kernel.tile if _ROWS[kernel.step] == "queries" else kernel.tile[::-1]
    if kernel.arch == "sm80":
        yield from _sm80(rows, streamed, kernel.head_dim)
    else:
        yield from _sm90(rows, streamed, kernel.head_dim)
        if kernel.step == "backward":
            yield from _left_transposed(rows, streamed, kernel.head_dim)
        if (kernel.step, kernel.head_dim) == ("backward_dq", 64):
            yield from _two_tiles(streamed)
            yield Check("sm90", "multiply_two_tiles", (streamed,))


def _sm80(rows: int, streamed: int, head_dim: int) -> Iterator[Check]:
    for tile_rows in (rows, streamed):
        yield Check("sm80", "swizzle", (tile_rows, head_dim))
        yield Check("sm80", "fragments", (tile_rows, head_dim))
    yield Check("sm80", "mma_multiply_transposed", (rows, streamed, head_dim))
    yield Check("sm80", "mma_multiply", (streamed, head_dim))


def _sm90(rows: int, streamed: int, head_dim: int) -> Iterator[Check]:
    for tile_rows in (rows, streamed):
        for what in ("addresses", "columns", "rows", "tensor_maps", "boxes"):
            yield Check("sm90", what, (tile_rows, head_dim))
    for columns in (streamed, head_dim):
        yield Check("sm90", "accumulator", (columns,))
    yield Check("sm90", "packed", (streamed,))
    yield Check("sm90", "staging", (rows, head_dim))
    yield Check("sm90", "multiply_transposed", (rows, streamed, head_dim))
    yield Check("sm90", "multiply", (streamed, head_dim))


def _left_transposed(keys: int, queries: int, head_dim: int) -> Iterator[Check]:
    """dQ = dS K of backward, with columns of ones beside those of K."""
    for what in ("addresses", "rows", "staging"):
        yield Check("sm90", what, (keys, queries))
    yield from _two_tiles(keys)
    yield Check("sm90", "multiply_left_transposed", (keys, head_dim))


def _two_tiles(keys: int) -> Iterator[Check]:
    """Ones in a tile of their own, which is not next to K."""
    for tiles_apart in (1, 12):
        yield Check("sm90", "two_tiles", (keys, tiles_apart))
    yield Check("sm90", "accumulator", (72,))


CHECKS = checks_of(KERNELS.values())
