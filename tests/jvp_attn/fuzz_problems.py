"""Random problems for the fuzzer: an entry point, its arguments, and what is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import jvp_attn
from jvp_attn import (
    flash_attn_jvp,
    flash_attn_varlen_jvp,
    flash_attn_with_tangent,
    merge_attention,
    replace_sdpa,
)
from tests.jvp_attn import fuzz_formula
from tests.jvp_attn.attention_cases import Named
from tests.jvp_attn.fuzz_derivatives import INPUTS, Attention, Autograd, FuncTransforms
from tests.jvp_attn.fuzz_formula import Variant


@dataclass
class Problem:
    """A problem and its data.

    Attributes:
        entry: "dense", "varlen", "with_tangent", "sdpa", "replaced" or "merge".
        derivative: a method of `Attention`.
        transforms: how it is taken.
        backend: name of the backend.
        dtype: of q, k and v.
        options: keyword arguments of the entry point.
        wrt: names of the inputs and tangents by which gradients are taken.
        data: the tensors, by the names of `fuzz_derivatives`.
        given: the same in other memory layouts, and with nonfinite numbers in masked places.
        mapped: for each tensor over which vmap maps, its place; None without vmap.
        size: of the mapped dimension.
    """

    entry: str
    derivative: str
    transforms: str
    backend: str
    dtype: torch.dtype
    options: dict[str, Any]
    wrt: list[str]
    data: dict[str, Tensor]
    given: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, int] | None = None
    size: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{n} {tuple(x.shape)}{x.stride()}" + ("" if x.dtype == self.dtype else f" {x.dtype}")
            for n, x in self.given.items()
        )
        mapped = f", vmap of {self.size} over {self.mapped}" if self.mapped else ""
        return (
            f"{self.entry}, {self.derivative} by {self.transforms}, {self.backend}, {self.dtype}, "
            f"{self.options}, gradients by {self.wrt}{mapped}; {'; '.join(self.notes)}; {shapes}"
        )

    # ------------------------------------------------------------------------
    # What is computed

    def ours(self) -> dict[str, Tensor]:
        """The results of the library."""
        call = _CALLS[self.entry]
        with_tangent = self.entry == "with_tangent"
        attention = Attention(
            lambda x: call(x, self.options),
            (lambda x: _with_tangent(x, self.options)) if with_tangent else None,
            {"func": FuncTransforms, "autograd": Autograd}[self.transforms],
            self.wrt,
        )
        compute = getattr(attention, self.derivative)
        if not self.mapped:
            return compute(self.given)
        in_dims = {n: self.mapped.get(n) for n in self.given}
        return torch.func.vmap(compute, in_dims=(in_dims,), randomness="error")(self.given)

    def formula(
        self, variant: Variant, dtype: torch.dtype, data: Named | None = None, merged: bool = False
    ) -> dict[str, Tensor]:
        """The results of the formula in another dtype, also of other data.

        With `merged`, the keys are split if the entry point splits them.
        """
        x = {
            n: (y.to(dtype) if y.is_floating_point() else y).clone(
                memory_format=torch.contiguous_format
            )
            for n, y in (data or self.data).items()
        }
        call = _FORMULAS[self.entry]
        if merged and self.entry == "merge":
            call = self._merged_formula
        attention = Attention(
            lambda x: call(x, self.options, variant),
            None,
            FuncTransforms,
            self.wrt,
        )
        compute = getattr(attention, self.derivative)
        if not self.mapped:
            return compute(x)
        each = [compute(self.example(x, i)) for i in range(max(self.size, 1))]
        return {n: torch.stack([y[n] for y in each])[: self.size] for n in each[0]}

    def example(self, x: Named, i: int) -> dict[str, Tensor]:
        """What vmap gives to the i-th call; zeros if it makes fewer."""
        example = dict(x)
        for n, dim in (self.mapped or {}).items():
            shape = x[n].shape[:dim] + x[n].shape[dim + 1 :]
            example[n] = x[n].select(dim, i) if i < self.size else x[n].new_zeros(shape)
        return example

    def stored_tangent_overflows(self) -> bool:
        """Whether tO, which derivatives of second order save in q's dtype, exceeds its range."""
        prefix = {"backward_of_jvp": "t", "jvp_of_backward": "h_", "backward_of_backward": "h_"}
        if self.derivative not in prefix:
            return False
        names = {n: prefix[self.derivative] + n for n in INPUTS}
        names = {f"t{n}": x for n, x in names.items() if x in self.data}
        if not names:
            return False
        mapped = self.mapped or {}
        jvp = replace(
            self,
            derivative="jvp",
            data={**self.data, **{t: self.data[n] for t, n in names.items()}},
            mapped=mapped and {**mapped, **{t: mapped[n] for t, n in names.items() if n in mapped}},
        )
        tout = jvp.formula(Variant(), torch.float64)["tout"]
        return not bool(tout.to(self.dtype).isfinite().all())

    def _merged_formula(
        self, x: Named, options: dict[str, Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        parts = []
        for part in _split(x, options["ends"]):
            # Gradients of what parts share are rounded in each before they are added.
            for n in ("q", "attn_mask"):
                if n in part and part[n] is x[n] and part[n].is_floating_point():
                    part[n] = part[n].to(self.data[n].dtype).to(part[n].dtype)
            out, lse, lse_lo = _dense_formula_with_lo(part, options, variant)
            parts.append((out.to(self.dtype), lse, lse_lo))
        return merge_attention(parts)[:2]

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each result."""
        wide = torch.promote_types(self.dtype, torch.float32)
        found = {"out": self.dtype, "tout": self.dtype, "lse": wide, "mu": wide}
        for n, x in self.data.items():
            found |= {f"{d}{n}": x.dtype for d in ("d_", "t_d_", "dd_")}
        return found | {f"t_{n}": x for n, x in found.items() if n in ("out", "lse")}


def _dense(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    return flash_attn_jvp(
        *(x["q"], x["k"], x["v"]),
        attn_mask=x.get("attn_mask"),
        seqused_k=x.get("seqused_k"),
        return_lse=True,
        **options,
    )


def _varlen(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    return flash_attn_varlen_jvp(
        *(x[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
        return_lse=True,
        **options,
    )


def _with_tangent(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    return flash_attn_with_tangent(
        *(x["q"], x["k"], x["v"], x.get("tq"), x.get("tk"), x.get("tv")),
        attn_mask=x.get("attn_mask"),
        tattn_mask=x.get("tattn_mask"),
        seqused_k=x.get("seqused_k"),
        return_lse=True,
        **options,
    )


def _torchs_options(x: Named, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    bias = options.pop("causal_bias", None)
    if bias is not None:
        make = causal_lower_right if bias == "lower_right" else causal_upper_left
        return {**options, "attn_mask": make(x["q"].shape[-2], x["k"].shape[-2])}
    return {**options, "attn_mask": x.get("attn_mask")}


def _sdpa(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    options = _torchs_options(x, options)
    return (jvp_attn.scaled_dot_product_attention(x["q"], x["k"], x["v"], **options),)


def _replaced(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    with replace_sdpa():
        options = _torchs_options(x, options)
        return (F.scaled_dot_product_attention(x["q"], x["k"], x["v"], **options),)


def _merge(x: Named, options: dict[str, Any]) -> tuple[Tensor, ...]:
    options = dict(options)
    ends = options.pop("ends")
    parts = [_dense(part, {**options, "return_lse_lo": True}) for part in _split(x, ends)]
    return merge_attention(parts)[:2]


def _split(x: Named, ends: list[int]) -> list[dict[str, Tensor]]:
    """The parts of the keys and of the mask."""
    parts = []
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        piece = {**x, "k": x["k"][:, start:stop], "v": x["v"][:, start:stop]}
        if "attn_mask" in x and x["attn_mask"].shape[-1:] not in ((), (1,)):
            piece["attn_mask"] = x["attn_mask"][..., start:stop]
        parts.append(piece)
    return parts


_CALLS: dict[str, Callable[[Named, dict[str, Any]], tuple[Tensor, ...]]] = {
    "dense": _dense,
    "varlen": _varlen,
    "with_tangent": _dense,
    "sdpa": _sdpa,
    "replaced": _replaced,
    "merge": _merge,
}


# ----------------------------------------------------------------------------
# The same by the formula


def _dense_formula(x: Named, options: dict[str, Any], variant: Variant) -> tuple[Tensor, ...]:
    return _dense_formula_with_lo(x, options, variant)[:2]


def _dense_formula_with_lo(
    x: Named, options: dict[str, Any], variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x[n].transpose(-3, -2) for n in ("q", "k", "v"))
    out, lse, lse_lo = fuzz_formula.attention(
        *(q, fuzz_formula.grouped(k, q.shape[-3]), fuzz_formula.grouped(v, q.shape[-3])),
        x.get("attn_mask"),
        dense_positions(x, options),
        _scale(options.get("softmax_scale"), q),
        variant,
    )
    return out.transpose(-3, -2), lse, lse_lo


def dense_positions(x: Named, options: dict[str, Any]) -> Tensor:
    """Which keys the lengths and the causal mask let a row see, (batch | 1, 1, rows, keys)."""
    m, n = x["q"].shape[-3], x["k"].shape[-3]
    used = torch.as_tensor(n)[None]
    if "seqused_k" in x:
        used = x["seqused_k"]
    used = used[:, None, None, None]
    visible = torch.arange(n) < used
    if options.get("causal"):
        visible = visible & fuzz_formula.causal(m, used, n, bottom_right=True)
    return visible


def _varlen_formula(x: Named, options: dict[str, Any], variant: Variant) -> tuple[Tensor, Tensor]:
    q, k, v = (x[n].transpose(-3, -2) for n in ("q", "k", "v"))
    out, lse = fuzz_formula.packed(
        *(q, fuzz_formula.grouped(k, q.shape[-3]), fuzz_formula.grouped(v, q.shape[-3])),
        (x["cu_seqlens_q"], x["cu_seqlens_k"]),
        options["causal"],
        _scale(options.get("softmax_scale"), q),
        variant,
    )
    return out.transpose(-3, -2), lse


def _sdpa_formula(x: Named, options: dict[str, Any], variant: Variant) -> tuple[Tensor]:
    q, k, v = x["q"], x["k"], x["v"]
    if options.get("enable_gqa") and q.ndim >= 3:
        k, v = fuzz_formula.grouped(k, q.shape[-3]), fuzz_formula.grouped(v, q.shape[-3])
    m, n = q.shape[-2], k.shape[-2]
    out, _, _ = fuzz_formula.attention(
        *(q, k, v),
        x.get("attn_mask"),
        sdpa_positions(m, n, options),
        _scale(options.get("scale"), q),
        variant,
    )
    return (out,)


def sdpa_positions(m: int, n: int, options: dict[str, Any]) -> Tensor | bool:
    if options.get("is_causal") or options.get("causal_bias") == "upper_left":
        return fuzz_formula.causal(m, n, n, bottom_right=False)
    if options.get("causal_bias") == "lower_right":
        return fuzz_formula.causal(m, n, n, bottom_right=True)
    return True


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is not None:
        return scale
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


_FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "dense": _dense_formula,
    "varlen": _varlen_formula,
    "with_tangent": _dense_formula,
    "sdpa": _sdpa_formula,
    "replaced": _sdpa_formula,
    "merge": _dense_formula,
}
