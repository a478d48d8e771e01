"""The problems that kernels are tested on: settings along many axes, and samples of their product.

A step (forward, jvp_backward_dkv, …) has a family of kernels for each architecture, with masks
and without: one kernel for each element type and head dim. The kernel is one of the axes.
`covering` samples the product of the axes (a covering array):

    strength 1    every kernel at least once, every value of every axis at least once
    strength 2    every pair of values of two axes at least once, so every value in every kernel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from random import Random
from zlib import crc32

from jvp_attn.backends.kernel_table import KERNELS, KernelEntry
from tests.kernels.buffers import LAYOUTS

# The value along each axis, as text.
Case = Mapping[str, str]

LENGTHS = ("1", "tile - 1", "tile", "tile + 1", "several tiles")
# The dimensions of (batch, heads, rows, columns) along which a mask does not broadcast.
MASK_DIMS = ("-", *("".join(c) for n in range(1, 5) for c in combinations("bhrc", n)))

_ALL_STEPS = {
    "queries": LENGTHS,
    "keys": LENGTHS,
    "heads": ("1 over 1", "2 over 2", "4 over 2", "8 over 1"),
    "sequences": ("one", "two", "padded", "packed", "packed and padded"),
    "causal": ("no", "bottom_right", "top_left"),
    "head dims": ("full", "full, narrow v", "even", "odd", "tiny"),
    "layouts": ("all dense", *LAYOUTS),
    "data": ("plain", "offset", "large logits", "huge where hidden"),
    "scale": ("default", "negative", "zero"),
}
_MASK = {
    "mask": ("boolean", "additive_element", "additive_float32"),
    "mask dims": MASK_DIMS,
    "mask hides": ("some", "whole rows", "the first keys", "all"),
}
_TANGENTS = {"tangents": ("q k v", "q", "k", "v", "q k", "q v", "k v", "")}
_LOW_ORDER = {"low order": ("written", "not wanted")}
_ANY_COTANGENTS = ("out lse tout mu", "out", "tout", "mu", "out tout", "lse mu", "lse tout", "lse")

_BY_STEP: dict[str, Mapping[str, Sequence[str]]] = {
    "forward": _LOW_ORDER,
    "forward_jvp": _TANGENTS | _LOW_ORDER,
    "forward_jvp_q": {"tangents": ("q", "")} | _LOW_ORDER,
    "tangent_only": _TANGENTS | _LOW_ORDER,
    "preprocess": _TANGENTS
    | {
        "cotangents": _ANY_COTANGENTS,
        "low order": ("given", "absent"),
        "wanted": ("beta delta", "delta"),
    },
    "backward": {"cotangents": ("out", "lse", "out lse")},
    "bwd_postprocess": {"cotangents": ("out", "lse", "out lse")},
    "backward_dq": {"cotangents": ("out", "lse", "out lse")},
    "backward_dkv": {"cotangents": ("out", "lse", "out lse")},
    "jvp_backward_dq": _TANGENTS
    | {"cotangents": _ANY_COTANGENTS, "wanted": ("grad_q grad_tq", "grad_q")},
    "jvp_backward_dkv": _TANGENTS
    | {
        "cotangents": _ANY_COTANGENTS,
        "wanted": (
            "grad_k grad_v grad_tk grad_tv",
            "grad_k grad_v",
            "grad_k grad_v grad_tk",
            "grad_k grad_v grad_tv",
        ),
    },
}
# Values that the kernels for an architecture do not support. TMA needs rows that start at
# multiples of 16 bytes.
_UNSUPPORTED: dict[str, Mapping[str, Sequence[str]]] = {
    "sm80": {},
    "sm90": {
        "head dims": ("odd", "tiny"),
        "layouts": [name for name, layout in LAYOUTS.items() if not layout.aligned],
        "scale": ("negative", "zero"),
    },
}


@dataclass(frozen=True)
class Family:
    """The kernels of a step that differ in element type and head dim only."""

    step: str
    masked: bool
    arch: str

    def __str__(self) -> str:
        return self.step + "_masked" * self.masked + f"_{self.arch}" * (self.arch != "sm80")

    @property
    def kernels(self) -> list[KernelEntry]:
        """For all element types and head dims."""
        return [kernel for kernel in KERNELS.values() if family_of(kernel) == self]


def family_of(kernel: KernelEntry) -> Family:
    """The family that a kernel belongs to."""
    return Family(kernel.step, kernel.masked, kernel.arch)


FAMILIES = list(dict.fromkeys(map(family_of, KERNELS.values())))


def axes_of(family: Family) -> dict[str, Sequence[str]]:
    """The values along each axis of the problems that a family of kernels supports."""
    kernels = {"kernel": [kernel.name for kernel in family.kernels]}
    mask = _MASK if family.masked else {}
    unsupported = _UNSUPPORTED[family.arch]
    return {
        name: [value for value in values if value not in unsupported.get(name, ())]
        for name, values in {**kernels, **_ALL_STEPS, **_BY_STEP[family.step], **mask}.items()
    }


def covering(axes: Mapping[str, Sequence[str]], strength: int) -> list[Case]:
    """Cases that have every combination of values of `strength` axes; the same each time."""
    missing = sorted(
        combination
        for names in combinations(axes, strength)
        for combination in product(*(_of_axis(name, axes[name]) for name in names))
    )
    random = Random(crc32(repr((axes, strength)).encode()))
    cases = []
    while missing:
        # Of some random cases, each with a missing combination, take the one that has the most.
        candidates = []
        for combination in random.sample(missing, min(len(missing), 20)):
            case = {name: random.choice(values) for name, values in axes.items()}
            case.update(combination)
            candidates.append(case)
        left = set(missing)
        best = max(candidates, key=lambda case: len(_combinations(case, strength) & left))
        found = _combinations(best, strength)
        missing = [combination for combination in missing if combination not in found]
        cases.append(best)
    return cases


def _of_axis(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, value) for value in values]


def _combinations(case: Case, strength: int) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(case.items(), strength))
