"""The problem of a case: lengths, masks, and the data that a kernel reads."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from jvp_attn.backends.kernel_table import KERNELS
from tests.kernels.buffers import EXPANDED_LAYOUTS, LAYOUTS, Layout
from tests.kernels.cases import Case
from tests.kernels.reference import INPUTS, Problem, never_seen

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# (head_dim, head_dim_v), by the head dim that the kernel pads to; None for any head dim.
_HEAD_DIMS: dict[str, dict[int | None, tuple[int, int]]] = {
    "full": {64: (64, 64), 96: (96, 96), 128: (128, 128), 256: (256, 256), None: (256, 256)},
    "full, narrow v": {64: (64, 8), 96: (96, 16), 128: (128, 24), 256: (256, 32), None: (64, 8)},
    "even": {64: (40, 64), 96: (72, 80), 128: (104, 128), 256: (136, 256), None: (72, 80)},
    "odd": {64: (57, 39), 96: (65, 91), 128: (127, 99), 256: (129, 255), None: (65, 91)},
    "tiny": {64: (3, 1), 96: (1, 5), 128: (2, 2), 256: (4, 7), None: (1, 5)},
}
_NO_TILE = (16, 16)  # lengths for a kernel without tiles


def random_of(case: Case, what: str) -> torch.Generator:
    """A generator for one tensor of a case, with a fixed seed."""
    return torch.Generator().manual_seed(crc32(f"{what} of {sorted(case.items())}".encode()))


def dtype_of(case: Case) -> torch.dtype:
    """The element type of the case's kernel."""
    return DTYPES[KERNELS[case["kernel"]].element]


def lengths_of(case: Case) -> tuple[int, int]:
    """The numbers of queries and keys of the longest sequence."""
    tile = KERNELS[case["kernel"]].tile or _NO_TILE
    queries, keys = (_length(case[x], t) for x, t in zip(("queries", "keys"), tile, strict=True))
    return queries, keys


def _length(value: str, tile: int) -> int:
    if value.isdecimal():
        return int(value)
    several = 2 * tile + 9 if tile >= 64 else 3 * tile + 9
    lengths = {"tile - 1": tile - 1, "tile": tile, "tile + 1": tile + 1, "several tiles": several}
    return lengths[value]


def _starts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))


def problem_of(case: Case) -> tuple[Problem, dict[str, tuple[int, ...]]]:
    """The problem, and the shapes of all INPUTS."""
    kernel = KERNELS[case["kernel"]]
    m, n = lengths_of(case)
    heads, heads_k = map(int, case["heads"].split(" over "))
    head_dim, head_dim_v = _HEAD_DIMS[case["head dims"]][kernel.head_dim]

    sequences, rows, keys = (2 if case["sequences"] in ("two", "padded") else 1), m, n
    starts_q = starts_k = used = None
    if "packed" in case["sequences"]:
        # One sequence without queries, one without keys, and rows that belong to no sequence.
        starts_q = _starts((m // 2 + 1, 0, m, 3))
        starts_k = _starts((n, min(n, 5), 0, n // 2 + 1))
        rows, keys = starts_q[-1] + 2, starts_k[-1] + 2
        used = (n - n // 3, 2, 0, 0) if case["sequences"] == "packed and padded" else None
    elif case["sequences"] == "padded":
        used = (n, n // 2)

    scale = {"default": head_dim**-0.5, "negative": -1.5 * head_dim**-0.5, "zero": 0.0}
    masked = (4 if starts_q else sequences, heads, m, n)
    mask = _mask(case, masked) if kernel.masked else None
    problem = Problem(scale[case["scale"]], case["causal"], mask, starts_q, starts_k, used)

    q, k = (sequences, rows, heads, head_dim), (sequences, keys, heads_k, head_dim)
    v, out, row = (*k[:3], head_dim_v), (*q[:3], head_dim_v), (sequences, heads, rows)
    shapes = (q, k, v, q, k, v, out, out, row, row)
    return problem, dict(zip(INPUTS, shapes, strict=True))


def _mask(case: Case, full_shape: tuple[int, int, int, int]) -> Tensor:
    """The mask, with size 1 along the dimensions where it broadcasts."""
    shape = [n if d in case["mask dims"] else 1 for d, n in zip("bhrc", full_shape, strict=True)]
    random = random_of(case, "mask")
    hidden = torch.rand(shape, generator=random) < 0.3
    if shape == [1, 1, 1, 1] or case["mask hides"] == "all":
        hidden[...] = case["mask hides"] == "all"
    if case["mask hides"] == "whole rows":
        hidden[..., ::3, :] = True
    if case["mask hides"] == "the first keys" and shape[3] > 1:
        _, tile = KERNELS[case["kernel"]].tile or _NO_TILE
        hidden[..., : min(tile, shape[3] - 1)] = True
    if case["mask"] == "boolean":
        return ~hidden
    dtype = torch.float32 if case["mask"] == "additive_float32" else dtype_of(case)
    bias = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    return bias.masked_fill(hidden, -torch.inf)


# ----------------------------------------------------------------------------
# Data


def present_inputs(case: Case) -> list[str]:
    """The names in INPUTS that are present."""
    tangents = [f"t{x}" for x in case.get("tangents", "").split()]
    cotangents = [f"grad_{x}" for x in case.get("cotangents", "").split()]
    return ["q", "k", "v", *tangents, *cotangents]


def layouts_of(case: Case, names: list[str], *, expanded: bool) -> dict[str, Layout]:
    """A layout for each of the tensors, each different from the one before."""
    if case["layouts"] == "all dense":
        return dict.fromkeys(names, LAYOUTS["dense"])
    every = LAYOUTS | EXPANDED_LAYOUTS if expanded else LAYOUTS
    if KERNELS[case["kernel"]].arch == "sm90":  # TMA supports no others
        every = {name: layout for name, layout in LAYOUTS.items() if layout.aligned}
    start = list(every).index(case["layouts"])
    step = 3  # not a divisor of how many there are
    chosen = {name: list(every)[(start + step * i) % len(every)] for i, name in enumerate(names)}
    for name, layout in chosen.items():
        huge = case["data"] == "huge where hidden"
        # With equal keys most gradients vanish. A key that is masked in one head may be seen in
        # another.
        if (layout == "one row for all" and "grad" not in name) or huge:
            chosen[name] = "dense" if layout in EXPANDED_LAYOUTS else layout
    return {name: every[layout] for name, layout in chosen.items()}


def huge(dtype: torch.dtype) -> float:
    """A value for masked keys, whose products overflow float32 if the dtype allows it."""
    return torch.finfo(dtype).max / 4


def data_of(case: Case, problem: Problem, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The inputs that are present; NaN in rows that belong to no sequence."""
    names = present_inputs(case)
    x = {
        n: torch.randn(shapes[n], generator=random_of(case, n), dtype=torch.float64) for n in names
    }
    if case["data"] == "offset":
        for name, mean in (("k", 5), ("tk", 5), ("v", 3)):
            if name in x:
                x[name] += mean
    if case["data"] == "large logits":
        for name in {"q", "tq"} & x.keys():
            x[name] *= 30
    if case["data"] == "huge where hidden":
        hidden = never_seen(problem, x["q"], x["k"])
        for name in {"k", "v", "tk", "tv"} & x.keys():
            x[name][hidden] = huge(dtype_of(case)) * x[name][hidden].sign()
    rounded = {n: y if y.ndim == 3 else y.to(dtype_of(case)) for n, y in x.items()}
    for name, y in rounded.items():
        starts = problem.cu_seqlens_k if name in ("k", "v", "tk", "tv") else problem.cu_seqlens_q
        if starts is not None:
            (y[..., starts[-1] :] if y.ndim == 3 else y[:, starts[-1] :]).fill_(torch.nan)
    return {n: y.float() if y.ndim == 3 else y for n, y in rounded.items()}
