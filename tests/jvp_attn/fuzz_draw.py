"""Draws a problem of the fuzzer from a seed."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.jvp_attn.fuzz_data import Layout, Numbers, random_layout
from tests.jvp_attn.fuzz_derivatives import INPUTS
from tests.jvp_attn.fuzz_problems import Problem, dense_positions, sdpa_positions

LENGTHS = [0, 1, 1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129, 200]
HEAD_DIMS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 127, 128]
LARGE_HEAD_DIMS = [129, 160, 192, 193, 255, 256, 257, 300]
MAX_WORK = 400_000  # multiplications of one product of all scores with all vectors

ENTRIES = {"dense": 9, "varlen": 3, "with_tangent": 3, "sdpa": 4, "replaced": 2, "merge": 2}
DERIVATIVES = {
    "forward": 1,
    "jvp": 2,
    "backward": 3,
    "backward_of_jvp": 4,
    "jvp_of_backward": 2,
    "backward_of_backward": 2,
}
DTYPES = {torch.float64: 3, torch.float32: 3, torch.bfloat16: 3, torch.float16: 2}
SCALES = [None, None, None, None, 1.0, 0.3, -0.7, 0.0, 1e-10, 30.0, 1e4]


def draw(seed: int, backend: str | None = None) -> Problem:
    """The problem of a seed; with one of the backends, or a random one of those for CPUs."""
    return _Draw(seed, backend).problem()


class _Draw:
    def __init__(self, seed: int, backend: str | None) -> None:
        self.rng = Random(seed)
        usual = self.rng.choice(["automatic", "automatic", "tiled"])
        self.backend = backend or usual
        self.emulated = self.backend.startswith("emulated")
        self.entry = self._of(ENTRIES)
        self.derivative = self._of(DERIVATIVES)
        if self.entry == "with_tangent":
            self.derivative = self.rng.choice(["jvp", "backward_of_jvp", "backward_of_jvp"])
        self.dtype = self._of(DTYPES)
        if self.emulated:
            self.dtype = self.rng.choice([torch.float16, torch.bfloat16])
        self.numbers = Numbers(self.rng, self.dtype)
        self.options: dict[str, Any] = {}
        self.data: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def _of(self, weights: dict[Any, int]) -> Any:
        return self.rng.choices([*weights], [*weights.values()])[0]

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # ------------------------------------------------------------------------
    # The whole problem

    def problem(self) -> Problem:
        mapped = not self.emulated and self.entry != "merge" and self._chance(0.12)
        size = self.rng.choice([0, 1, 1, 2, 2, 2, 3, 3]) if mapped else 0
        if mapped and self.derivative == "jvp_of_backward":
            size = max(size, 1)  # torch asserts that empty tangents have the layout of the primal
        self._draw_sizes(max(size, 1))
        shapes = self._shapes()
        ordinary = self._chance(0.4)
        for n in ("q", "k", "v"):
            kinds = 1.0 if ordinary or self.emulated else 0.55
            if n == "v":
                no_products = self.derivative in ("forward", "jvp")
                x = self.numbers.value(shapes[n], kinds, may_overflow=no_products)
            else:
                x = self.numbers.score_factor(shapes[n], kinds)
            self.data[n] = x.to(self.dtype)
        self._draw_options()
        if (mask_shape := self._mask_shape()) is not None:
            self.data["attn_mask"] = self._mask(mask_shape)
        self._draw_other_tensors(shapes)
        mapping = self._map(size) if mapped else None
        layouts = self._layouts(mapped)
        self.data = {n: layouts[n].shared(x) for n, x in self.data.items()}
        problem = Problem(
            entry=self.entry,
            derivative=self.derivative,
            transforms="func" if mapped else self.rng.choice(["func", "autograd"]),
            backend=self.backend,
            dtype=self.dtype,
            options=self.options,
            wrt=self.wrt,
            data=self.data,
            mapped=mapping,
            size=size,
            notes=self.notes,
        )
        given = self.data
        if not mapped and not self.emulated and self._chance(0.3):
            given = self._with_nonfinite(layouts)
        problem.given = {n: layouts[n](x) for n, x in given.items()}
        return problem

    # ------------------------------------------------------------------------
    # Shapes

    def _draw_sizes(self, size: int) -> None:
        rng = self.rng
        while True:
            self.batch = rng.choice([1, 1, 2, 2, 3, 0 if self._chance(0.1) else 1])
            self.heads_k = rng.choice([1, 1, 2, 3])
            self.group = rng.choice([1, 1, 1, 2, 3])
            self.m, self.n = rng.choice(LENGTHS), rng.choice(LENGTHS)
            self.d = rng.choice(LARGE_HEAD_DIMS if self._chance(0.1) else HEAD_DIMS)
            self.dv = self.d if self._chance(0.6) else rng.choice(HEAD_DIMS)
            if self._chance(0.03):
                self.dv = rng.choice(LARGE_HEAD_DIMS)
            if self._chance(0.02):
                setattr(self, rng.choice(["heads_k", "d", "dv"]), 0)
            work = size * self.batch * self.heads_k * self.group * self.m * self.n
            work *= max(self.d, self.dv)
            if work <= MAX_WORK // (4 if self.emulated else 1):
                break
        self.heads = self.heads_k * self.group
        if self.entry == "varlen":
            count = rng.choice([0, 1, 2, 3, 5])
            self.lengths = [
                (rng.choice([0, 1, 3, 17, 33]), rng.choice([0, 1, 5, 16, 65])) for _ in range(count)
            ]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.entry == "varlen":
            return self._packed_shapes()
        if self.entry in ("sdpa", "replaced"):
            return self._torchs_shapes()
        return {
            "q": (self.batch, self.m, self.heads, self.d),
            "k": (self.batch, self.n, self.heads_k, self.d),
            "v": (self.batch, self.n, self.heads_k, self.dv),
        }

    def _packed_shapes(self) -> dict[str, tuple[int, ...]]:
        ends = torch.tensor([(0, 0), *self.lengths]).cumsum(0).int()
        self.data["cu_seqlens_q"], self.data["cu_seqlens_k"] = ends.clone().unbind(1)
        beyond = self.rng.choice([0, 0, 1, 4])
        m, n = (int(x) + beyond for x in ends[-1])
        return {
            "q": (m, self.heads, self.d),
            "k": (n, self.heads_k, self.d),
            "v": (n, self.heads_k, self.dv),
        }

    def _torchs_shapes(self) -> dict[str, tuple[int, ...]]:
        rank = self.rng.choice([2, 3, 4, 4, 4, 5, 5])
        if rank == 2:
            self.heads_k = self.heads = 1
        batch = {4: (self.batch,), 5: (self.rng.choice([1, 2, 3]), self.batch)}.get(rank, ())
        heads = (self.heads,) if rank >= 3 else ()
        heads_k = (self.heads_k,) if rank >= 3 else ()
        if self.heads != self.heads_k:
            self.options["enable_gqa"] = True
        shapes = {
            "q": (*batch, *heads, self.m, self.d),
            "k": (*batch, *heads_k, self.n, self.d),
            "v": (*batch, *heads_k, self.n, self.dv),
        }
        if rank >= 4 and self._chance(0.2):  # broadcast over the batch
            name, dim = self.rng.choice(["q", "k", "v"]), self.rng.randrange(rank - 3)
            shapes[name] = tuple(1 if i == dim else x for i, x in enumerate(shapes[name]))
        self.scores = (*torch.broadcast_shapes(*(x[:-3] for x in shapes.values())), *heads)
        return shapes

    # ------------------------------------------------------------------------
    # Options and masks

    def _draw_options(self) -> None:
        rng = self.rng
        scale = rng.choice(SCALES[:8] if self.emulated else SCALES)
        causal = self._chance(0.35)
        if self.entry in ("sdpa", "replaced"):
            self.options |= {"scale": scale}
            if causal:
                self.options |= rng.choice(
                    [
                        {"is_causal": True},
                        {"causal_bias": "upper_left"},
                        {"causal_bias": "lower_right"},
                    ]
                )
            return
        self.options |= {"softmax_scale": scale, "causal": causal and self.entry != "merge"}
        if self._chance(0.2):
            self.options["deterministic"] = False
        if self.entry == "varlen":
            longest = [max((x[i] for x in self.lengths), default=0) for i in (0, 1)]
            more = rng.choice([0, 0, 3])
            self.options |= {"max_seqlen_q": longest[0] + more, "max_seqlen_k": longest[1] + more}
        elif self.entry == "merge":
            ends = sorted(rng.randint(0, self.n) for _ in range(rng.choice([0, 1, 2])))
            self.options["ends"] = [*ends, self.n]
        elif self._chance(0.25):
            used = [rng.choice([0, 1, self.n, rng.randint(0, self.n)]) for _ in range(self.batch)]
            used = [min(x, self.n) for x in used]
            self.data["seqused_k"] = torch.tensor(used, dtype=torch.int32)

    def _mask_shape(self) -> tuple[int, ...] | None:
        if self.entry == "varlen" or self._chance(0.35):
            return None
        if "is_causal" in self.options or "causal_bias" in self.options:
            return None
        full = (self.batch, self.heads, self.m, self.n)
        if self.entry in ("sdpa", "replaced"):
            full = (*self.scores, self.m, self.n)
        shape = tuple(x if self._chance(0.6) else 1 for x in full)
        if self._chance(0.3):
            shape = full
        return shape[self.rng.choice([0, 0, self.rng.randint(0, len(shape))]) :]

    def _mask(self, shape: tuple[int, ...]) -> Tensor:
        rng, numbers = self.rng, self.numbers
        hidden = numbers.uniform(shape) < rng.choice([0, 0.1, 0.3, 0.9])
        rows = numbers.uniform((*shape[:-1], 1)[: len(shape)]) < rng.choice([0, 0.2, 0.5, 1])
        if self._chance(0.5):
            rows = torch.zeros_like(rows)
        if self._chance(0.3):
            return ~(hidden | rows)
        half = self.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half and self._chance(0.4) else self.dtype
        limits, own = torch.finfo(dtype), torch.finfo(self.dtype)
        low = rng.choice(
            [-torch.inf, -torch.inf, limits.min, limits.min, own.min, -1e4, -1e6, -1e9, -1e30, 1e8]
        )
        if dtype == torch.float64:
            low = rng.choice([low, torch.finfo(torch.float32).min])
        low = low if low == -torch.inf else max(min(low, limits.max), limits.min)
        bias = numbers.normal(shape) if self._chance(0.5) else numbers.zeros(shape)
        whole = rng.choice(["set", "add"])
        self.notes.append(f"mask {dtype}, {low:g} {whole}")
        if whole == "add" and low != -torch.inf:
            bias = torch.where(hidden | rows, numbers.clamped(bias + low), bias)
            return bias.clamp(limits.min, limits.max).to(dtype)
        return bias.masked_fill(hidden | rows, low).to(dtype)

    # ------------------------------------------------------------------------
    # Tangents, cotangents, directions

    def _draw_other_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        inputs = [n for n in INPUTS if n in self.data and self.data[n].is_floating_point()]
        with_tangent: list[str] = []
        if "jvp" in self.derivative.split("_of_")[-1]:
            with_tangent = self._subset(inputs, least=0 if self.entry == "with_tangent" else 1)
        for n in with_tangent:
            self.data[f"t{n}"] = self._like(self.data[n])
        self.wrt = []
        if "backward" not in self.derivative:
            return
        candidates = inputs + [f"t{n}" for n in with_tangent]
        self.wrt = self._subset(candidates, least=1)
        outputs = ["out"] if self.entry in ("sdpa", "replaced") else ["out", "lse"]
        if self.derivative == "backward_of_jvp":
            outputs += {"out": ["tout"], "lse": ["mu"]}[outputs[0]] if len(outputs) == 1 else []
            outputs += ["tout", "mu"] if len(outputs) == 2 and "lse" in outputs else []
        for n in self._subset(outputs, least=1):
            self.data[f"c_{n}"] = self._cotangent(n, shapes)
        if self.derivative == "jvp_of_backward":
            cotangents = [n for n in self.data if n.startswith("c_")]
            for n in self._subset(inputs + cotangents, least=1):
                self.data[f"h_{n}"] = self._like(self.data[n])
        elif self.derivative == "backward_of_backward":
            for n in self._subset(self.wrt, least=1):
                self.data[f"h_{n}"] = self._like(self.data[n])

    def _subset(self, names: list[str], least: int) -> list[str]:
        chosen = [n for n in names if self._chance(0.75)]
        return chosen if len(chosen) >= least else [self.rng.choice(names)]

    def _like(self, x: Tensor) -> Tensor:
        ordinary = 1.0 if self.emulated else 0.85
        return self.numbers.direction(tuple(x.shape), ordinary).to(x.dtype)

    def _cotangent(self, name: str, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        out = (*shapes["q"][:-1], self.dv)
        if self.entry in ("sdpa", "replaced"):
            out = (*self.scores, self.m, self.dv)[-max(len(x) for x in shapes.values()) :]
        rows = (*out[:-3], out[-2], out[-3]) if len(out) > 2 else ()
        dtype = self.dtype
        if name in ("lse", "mu"):
            dtype = torch.promote_types(dtype, torch.float32)
        return self._like(torch.empty(rows if name in ("lse", "mu") else out, dtype=dtype))

    # ------------------------------------------------------------------------
    # vmap, layouts, nonfinite numbers

    def _map(self, size: int) -> dict[str, int]:
        """Give some tensors another dimension, along which they differ."""
        mapped = {}
        names = [n for n in self.data if not n.startswith("cu_seqlens")]
        for n in self._subset(names, least=1):
            x = self.data[n]
            mapped[n] = self.rng.randint(0, x.ndim)
            copies = [x]
            for _ in range(size - 1):
                if x.is_floating_point() and not n.endswith("attn_mask"):
                    copies.append(self._like(x) if n[0] not in "qkv" else x.flip(-1))
                else:
                    copies.append(x.flip(-1) if x.ndim else x)
            self.data[n] = torch.stack(copies, mapped[n]).narrow(mapped[n], 0, size)
        return mapped

    def _layouts(self, mapped: bool) -> dict[str, Layout]:
        layouts: dict[str, Layout] = {}
        for n, x in self.data.items():
            may_expand = not n.startswith(("cu_seqlens", "seqused")) and not mapped
            layouts[n] = random_layout(self.rng, x.ndim, may_expand)
            primal = n.removeprefix("h_").removeprefix("t")
            # torch requires of the tangent of an expanded primal that it is expanded too.
            if primal != n and primal in layouts and layouts[primal].expanded:
                layouts[n] = layouts[primal]
        return layouts

    def _with_nonfinite(self, layouts: dict[str, Layout]) -> dict[str, Tensor]:
        """The data with NaN or infinity in keys and queries that are masked everywhere."""
        hidden = self._hidden()
        if hidden is None:
            return self.data
        hidden_keys, hidden_rows = hidden
        value = self.rng.choice([torch.nan, torch.inf, -torch.inf])
        given = dict(self.data)
        for n, x in self.data.items():
            bare = n.removeprefix("h_").removeprefix("t")
            places = {"k": hidden_keys, "v": hidden_keys, "q": hidden_rows}.get(bare)
            if places is not None and not layouts[n].expanded and self._chance(0.7):
                given[n] = x.masked_fill(places, value)
                self.notes.append(f"{value} in {int(places.sum())} vectors of {n}")
        return given

    def _hidden(self) -> tuple[Tensor, Tensor] | None:
        """Which keys are masked for all queries, and which queries see no key."""
        if self.entry == "varlen":
            end_q, end_k = (int(self.data[f"cu_seqlens_{x}"][-1]) for x in "qk")
            q, k = self.data["q"], self.data["k"]
            return (
                (torch.arange(len(k)) >= end_k)[:, None, None],
                (torch.arange(len(q)) >= end_q)[:, None, None],
            )
        torchs = self.entry in ("sdpa", "replaced")
        if torchs and (self.data["q"].ndim < 4 or self.data["q"].shape[:-3] != self.scores[:-1]):
            return None
        if torchs and self.data["k"].shape[:-3] != self.data["q"].shape[:-3]:
            return None
        if torchs and self.data["v"].shape[:-3] != self.data["q"].shape[:-3]:
            return None
        batch = self.scores[:-1] if torchs else (self.batch,)
        scores = (*batch, self.heads, self.m, self.n)
        visible = torch.ones(scores, dtype=torch.bool)
        if torchs:
            visible = visible & sdpa_positions(self.m, self.n, self.options)
        else:
            visible = visible & dense_positions(self.data, self.options)
        mask = self.data.get("attn_mask")
        if mask is not None:
            visible = visible & (mask if mask.dtype == torch.bool else mask > -torch.inf)
        grouped = visible.unflatten(-3, (self.heads_k, self.group))
        keys = ~grouped.any(-2).any(-2)[..., None]  # (*batch, heads_k, n, 1)
        rows = ~visible.any(-1)[..., None]  # (*batch, heads, m, 1)
        return (keys, rows) if torchs else (keys.transpose(-3, -2), rows.transpose(-3, -2))
